"""Selection of scores that are made from weights, vectors, maps and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError

pytestmark = pytest.mark.cuda_source
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of one, of less than a warp, off every power of two, of more than a tile.
SHAPES = ((1, 1), (700, 3), (33, 31), (64, 32), (7, 1000), (3, 9001), (130, 257))


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def layers(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    a = [torch.rand(shape[1]) for shape in SHAPES]
    g = [torch.rand(shape[0]) for shape in SHAPES]
    g[2][::3] = 0  # ties at 0
    return weights, a, g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("exponents", [[0] * 7, [0, 3, -40, 900, 7, 7, -100_000]], ids=str)
def test_vectors(dtype: torch.dtype, power: int, exponents: list[int]) -> None:
    weights, a, g = layers(dtype)
    total = sum(w.numel() for w in weights)
    masks = [None, ops.pack_mask(torch.rand(700, 3) < 0.5), None, None, None, None, None]
    for k in (0, 1, total // 50, total // 2, total - 1, [w.numel() // 3 for w in weights]):
        for kept in (None, masks):
            wanted = ops.topk_mask_factored(weights, a, g, exponents, k, power=power, masks=kept)
            with registry.using("cuda_source"):
                found = ops.topk_mask_factored(weights, a, g, exponents, k, power=power, masks=kept)
            assert same(found, wanted), k


def test_strides_and_float64() -> None:
    weight = torch.randn(90, 40, dtype=torch.float64)
    a, g = torch.rand(90, 2, dtype=torch.float64)[:, 0], torch.rand(40)
    wanted = ops.topk_mask_factored([weight.T], [a], [g], [0], 700)
    with registry.using("cuda_source"):
        assert same(ops.topk_mask_factored([weight.T], [a], [g], [0], 700), wanted)


def whole(*shape: int) -> Tensor:
    """Small integers: sums of their products are exact in any order."""
    return torch.randint(0, 4, shape).float()


CONVS = [
    # weight, x, (stride, padding, dilation, groups)
    ((8, 3, 3, 3), (2, 3, 9, 7), ([1, 1], [1, 1], [1, 1], 1)),
    ((6, 2, 3, 2), (1, 4, 11, 8), ([2, 1], [0, 1], [1, 2], 2)),
    ((5, 4, 1, 1), (3, 4, 6, 6), ([2, 2], [0, 0], [1, 1], 1)),
    ((4, 3, 5), (2, 3, 17), ([1], [2], [1], 1)),
    ((3, 2, 2, 3, 2), (1, 2, 4, 5, 6), ([1, 2, 1], [1, 0, 1], [1, 1, 2], 1)),
    ((12, 1, 3, 3), (2, 12, 5, 5), ([1, 1], [1, 1], [1, 1], 12)),
]


def out_size(weight: tuple[int, ...], x: tuple[int, ...], conv: tuple) -> tuple[int, ...]:
    stride, padding, dilation, _ = conv
    axes = zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_of_convolutions_and_linear_layers(power: int, dtype: torch.dtype) -> None:
    weights = [torch.randint(-5, 6, w).to(dtype) for w, _, _ in CONVS]
    x = [whole(*shape) for _, shape, _ in CONVS]
    g = [whole(s[0], w[0], *out_size(w, s, conv)) for w, s, conv in CONVS]
    convs = [conv for _, _, conv in CONVS]
    weights += [torch.randint(-5, 6, (20, 30)).to(dtype), torch.randn(40, 50).to(dtype)]
    x += [whole(6, 30), torch.rand(50)]
    g += [whole(6, 20), torch.rand(40)]
    given = {"convs": [*convs, None, None], "power": power}
    total = sum(w.numel() for w in weights)
    for exponents in ([0] * 8, [3, 0, 0, -2, 5, 1, 0, 2]):
        for k in (1, total // 10, total // 2, [w.numel() // 2 for w in weights]):
            wanted = ops.topk_mask_factored(weights, x, g, exponents, k, **given)
            with registry.using("cuda_source"):
                found = ops.topk_mask_factored(weights, x, g, exponents, k, **given)
            assert same(found, wanted), (exponents, k)


def test_maps_score_only_candidates_and_stay_near_the_reference() -> None:
    """Real maps: every backend adds in an order of its own, so thresholds agree, not all masks."""
    weight, x, g = torch.randn(16, 8, 3, 3), torch.rand(4, 8, 12, 12), torch.rand(4, 16, 12, 12)
    conv = ([1, 1], [1, 1], [1, 1], 1)
    kept = ops.pack_mask(torch.rand(weight.shape) < 0.5)
    with registry.using("cuda_source"):
        (bits,) = ops.topk_mask_factored([weight], [x], [g], [0], 200, convs=[conv], masks=[kept])
        again = ops.topk_mask_factored([weight], [x], [g], [0], 200, convs=[conv], masks=[kept])
    assert torch.equal(bits, again[0])
    chosen = ops.unpack_mask(bits, weight.shape)
    score = ops.path_conv_score(weight.double(), x.double(), g.double(), *conv)
    allowed = ops.unpack_mask(kept, weight.shape)
    assert int(chosen.sum()) == 200
    assert not (chosen & ~allowed).any()
    assert score[chosen].min() >= score[allowed & ~chosen].max() * (1 - 1e-5)


@pytest.mark.parametrize("first", DTYPES, ids=str)
@pytest.mark.parametrize("second", [torch.float32, torch.float16, torch.float64], ids=str)
def test_products(first: torch.dtype, second: torch.dtype) -> None:
    sizes = (0, 1, 33, 8193, 20_001)
    weights = [torch.randn(n).to(first) for n in sizes]
    slopes = [(torch.randn(n) * 3).round().to(second) for n in sizes]  # zeros tie
    masks = [None, None, None, ops.pack_mask(torch.rand(8193) < 0.2), None]
    for k in (1, 3000, 25_000, [0, 1, 11, 4000, 20_001]):
        for kept in (None, masks):
            wanted = ops.topk_mask_product(weights, slopes, k, masks=kept)
            with registry.using("cuda_source"):
                assert same(ops.topk_mask_product(weights, slopes, k, masks=kept), wanted), k


def test_nan_is_named_where_a_score_has_no_rank() -> None:
    w, zero = torch.ones(3, 40), torch.zeros(3)
    a = torch.ones(40)
    a[7] = torch.inf
    with registry.using("cuda_source"):
        with pytest.raises(NonFiniteScoreError, match="scores of second hold NaN"):
            ops.topk_mask_factored(
                [w, w], [torch.ones(40), a], [zero, zero], [0, 1], 9, names=["first", "second"]
            )
        with pytest.raises(NonFiniteScoreError, match=r"topk_mask_product: scores\[0\]"):
            ops.topk_mask_product(torch.tensor([0.0, 1.0]), torch.tensor([torch.inf, 1.0]), 1)
