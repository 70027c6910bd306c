from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.selection_cases import equal, lexsort_masks, unpacked

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def factored(weight: Tensor, a: Tensor, g: Tensor, power: int) -> Tensor:
    """The score by the definition: float32, the products in this order."""
    powered = weight.float().abs() if power == 1 else weight.float() * weight.float()
    return (powered * a) * g[:, None]


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weights, left, right, masks = [], [], [], []
    for _ in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.sampled_from([(0, 5), (1, 1), (3, 7), (8, 8), (5, 31), (33, 2)]))
        weight = torch.randn(rows, columns, generator=generator)
        if draw(st.booleans()):
            weight = weight.round()
        weight = weight.to(draw(st.sampled_from(DTYPES)))
        weights.append(weight.T.contiguous().T if draw(st.booleans()) else weight)
        left.append(
            torch.rand(columns, generator=generator) * draw(st.sampled_from([0.0, 1e-20, 1.0]))
        )
        right.append(torch.rand(rows, generator=generator).round(decimals=1))
        mask = torch.rand(rows, columns, generator=generator) < 0.5
        masks.append(ops.pack_mask(mask) if draw(st.booleans()) else None)
    return weights, left, right, masks


@settings(max_examples=500, deadline=None, derandomize=True)
@given(layers(), st.sampled_from([1, 2]), st.booleans(), st.data())
def test_topk_mask_factored_equals_lexsort(case, power: int, each: bool, data) -> None:
    weights, a, g, masks = case
    sizes = [w.numel() for w in weights]
    exponents = [data.draw(st.integers(-300, 300)) for _ in sizes]
    if each:
        k: int | list[int] = [data.draw(st.integers(0, n)) for n in sizes]
    else:
        k = data.draw(st.integers(0, sum(sizes)))
    scores = [factored(w, x, y, power) for w, x, y in zip(weights, a, g, strict=True)]
    scores = [
        s if m is None else s.masked_fill(~ops.unpack_mask(m, s.shape), -math.inf)
        for s, m in zip(scores, masks, strict=True)
    ]
    wanted = lexsort_masks(scores, k, None if each else exponents)
    for backend in ("cpu", "reference"):
        with registry.using(backend):
            found = ops.topk_mask_factored(weights, a, g, exponents, k, power=power, masks=masks)
        assert equal(unpacked(found, weights), wanted), backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponents", [[0, 0], [5, -40]], ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_topk_mask_factored_of_large_layers(
    dtype: torch.dtype, exponents: list[int], power: int
) -> None:
    weights = [torch.randn(300, 517).to(dtype), torch.randn(1000, 70).to(dtype)]
    a, g = [torch.rand(517), torch.rand(70)], [torch.rand(300), torch.rand(1000)]
    scores = [factored(*layer, power) for layer in zip(weights, a, g, strict=True)]
    first = ops.topk_mask(scores, 150_000, exponents=exponents)
    assert equal(unpacked(first, weights), lexsort_masks(scores, 150_000, exponents))
    for masks in (None, first):
        found = ops.topk_mask_factored(weights, a, g, exponents, 20_000, power=power, masks=masks)
        assert equal(unpacked(found, weights), lexsort_masks(scores, 20_000, exponents))


def test_topk_mask_factored_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    a, g = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 10.0])  # scores [[2, 3], [40, 5]]
    assert ops.topk_mask_factored([weight], [a], [g], [0], 3)[0].tolist() == [0b1110]
    # squares: [[2, 9], [80, 2.5]]
    assert ops.topk_mask_factored([weight], [a], [g], [0], 2, power=2)[0].tolist() == [0b0110]
    only = torch.tensor([0b0011], dtype=torch.uint8)
    assert ops.topk_mask_factored([weight], [a], [g], [0], 1, masks=[only])[0].tolist() == [0b0010]
    twice = [weight, weight], [a, a], [g, g]
    assert [b.tolist() for b in ops.topk_mask_factored(*twice, [0, 5], 3)] == [[0], [0b1110]]


def test_topk_mask_factored_fills_up_with_the_first_of_the_excluded() -> None:
    weights = [torch.rand(2, 4), torch.rand(2, 4)]
    a, g = [torch.ones(4)] * 2, [torch.ones(2)] * 2
    masks = [torch.tensor([0b10000], dtype=torch.uint8), torch.tensor([0], dtype=torch.uint8)]
    packed = ops.topk_mask_factored(weights, a, g, [0, 900], 3, masks=masks)
    assert [bits.tolist() for bits in packed] == [[0b10011], [0]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_topk_mask_factored_refuses_nan_of_candidates_only(backend: str) -> None:
    weight, a, g = torch.ones(2, 3), torch.ones(3), torch.ones(2)
    weight[1, 2] = math.nan
    others = torch.tensor([0b011111], dtype=torch.uint8)
    with registry.using(backend):
        with pytest.raises(NonFiniteScoreError, match=r"head\.weight hold NaN"):
            ops.topk_mask_factored([weight], [a], [g], [0], 2, names=["head.weight"])
        assert ops.topk_mask_factored([weight], [a], [g], [0], 2, masks=[others])[0].tolist() == [3]


def test_topk_mask_factored_refuses_infinity_times_zero() -> None:
    weight = torch.tensor([[math.inf, 1.0]])
    with pytest.raises(NonFiniteScoreError, match=r"scores\[0\]"):
        ops.topk_mask_factored([weight], [torch.zeros(2)], [torch.ones(1)], [0], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power": 3}, "power must be 1 or 2, got 3"),
        ({"k": 7}, r"k must be in \[0, 6\], got 7"),
        ({"a": [torch.ones(2)]}, r"needs weight \[out, in\], a \[in\], g \[out\]"),
        ({"g": []}, "give one of each a layer"),
        ({"exponents": [0, 0]}, "give one of each a layer"),
        ({"masks": [torch.zeros(0, dtype=torch.uint8)]}, "holds 0 bits, 6 are needed"),
        ({"names": []}, "0 names for 1 tensors"),
    ],
)
def test_topk_mask_factored_errors(changes: dict, message: str) -> None:
    arguments = {
        "weights": [torch.ones(2, 3)], "a": [torch.ones(3)], "g": [torch.ones(2)],
        "exponents": [0], "k": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.topk_mask_factored(**{**arguments, **changes})
