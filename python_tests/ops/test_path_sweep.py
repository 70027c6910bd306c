from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.path_cases import DTYPES, exact, ids, keep, within

SHAPES = [(1, 1), (31, 33), (33, 31), (1, 1000), (1000, 1), (1000, 31), (70, 2100), (300, 4104)]


def scores(weight: Tensor, a: Tensor, g: Tensor, power: int, mask: Tensor | None) -> Tensor:
    """The score by the definition: float32, the products in this order, -inf where pruned."""
    w = weight.float().abs()
    powered = torch.ones_like(w) if power == 0 else w if power == 1 else w * w
    score = (powered * a.float()) * g.float()[:, None]
    return score if mask is None else score.masked_fill(~mask, -math.inf)


def check(
    shape: tuple[int, int], dtype: torch.dtype, density: float | None, power: int, ties: bool
) -> None:
    weight = torch.randn(shape).to(dtype)
    a, g = torch.rand(shape[1]), torch.rand(shape[0])
    if ties:
        weight, a, g = weight.mul(2).round(), a.mul(3).ceil(), g.mul(3).ceil()
    mask, packed = keep(weight, density) if density else (None, None)
    score = scores(weight, a, g, power, mask)
    some = score.flatten()[score.numel() // 2]
    threshold = float(some) if some >= 0 else 0.5
    x, bits, kept = ops.path_sweep(weight, a, g, threshold, power=power, mask=packed)
    above = score > threshold
    assert torch.equal(bits, ops.pack_mask(above))
    assert kept.dtype == torch.int64
    assert int(kept) == int(above.sum())
    assert torch.equal(x, ops.path_backward(weight, g, power=power, mask=packed))
    values = exact(weight, power, mask)
    within(x, g @ values.float(), g.double() @ values)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("density", [None, 0.5])
@pytest.mark.parametrize("ties", [False, True])
def test_path_sweep_equals_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, density: float | None, ties: bool
) -> None:
    for power in (0, 1, 2):
        check(shape, dtype, density, power, ties)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("power", [1, 2])
def test_path_sweep_agrees_with_the_exact_selection(dtype: torch.dtype, power: int) -> None:
    """Given the threshold of a selection without ties, the bits are those of the selection."""
    weight, a, g = torch.randn(130, 257).to(dtype), torch.rand(257), torch.rand(130)
    _, packed = keep(weight, 0.7)
    score = scores(weight, a, g, power, ops.unpack_mask(packed, weight.shape))
    threshold = ops.kth_largest(score, 1000)
    _, bits, kept = ops.path_sweep(weight, a, g, threshold, power=power, mask=packed)
    selected = ops.topk_mask_factored(
        [weight], [a], [g], [0], int(kept), power=power, masks=[packed]
    )
    assert 900 < int(kept) < 1000
    assert torch.equal(bits, selected[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_path_sweep_by_hand(backend: str) -> None:
    weight = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    a, g = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 10.0])  # scores [[2, 3], [40, 5]]
    only = torch.tensor([0b1011], dtype=torch.uint8)
    with registry.using(backend):
        for threshold, power, mask, x, bits in (
            (3.0, 1, None, [21.0, 8.0], 0b1100),  # 3 is not above 3
            (2.9, 1, None, [21.0, 8.0], 0b1110),
            (-math.inf, 1, None, [21.0, 8.0], 0b1111),
            (math.inf, 1, None, [21.0, 8.0], 0b0000),
            (2.5, 2, None, [41.0, 11.5], 0b0110),  # squares: [[2, 9], [80, 2.5]]
            (-1.0, 1, only, [1.0, 8.0], 0b1011),  # what is pruned stays so
            (2.0, 0, only, [1.0, 11.0], 0b1000),  # ones: [[2, 1], [20, 10]]
        ):
            found = ops.path_sweep(weight, a, g, threshold, power=power, mask=mask)
            assert found[0].tolist() == x
            assert found[1].tolist() == [bits]
            assert int(found[2]) == bin(bits).count("1")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_path_sweep_compares_exactly_with_a_threshold_that_is_no_float32(backend: str) -> None:
    one = torch.ones(1, 1)
    with registry.using(backend):
        for threshold, bit in ((1 - 2**-40, 1), (1.0, 0), (1 + 2**-40, 0), (1e300, 0), (-1e300, 1)):
            assert ops.path_sweep(one, one[0], one[0], threshold)[1].tolist() == [bit]
        tiny = torch.tensor([2.0**-149])
        for threshold, bit in ((0.0, 1), (1e-60, 1), (2.0**-149, 0)):
            assert ops.path_sweep(one, tiny, one[0], threshold)[1].tolist() == [bit]


def test_path_sweep_counts_subnormal_scores_whatever_the_thread_does() -> None:
    weight, a, g = torch.rand(40, 50), torch.rand(50), torch.full((40,), 1e-40)
    wanted = ops.path_sweep(weight, a, g, 2e-41)
    assert 0 < int(wanted[2]) < 2000
    try:
        assert torch.set_flush_denormal(True)
        found = ops.path_sweep(weight, a, g, 2e-41)
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("density", [None, 0.5])
def test_path_sweep_takes_tensors_in_any_layout_and_type(density: float | None) -> None:
    weight = torch.randn(33, 62)[:, ::2].T  # [31, 33], not contiguous
    a, g = torch.rand(66, dtype=torch.float16)[::2], torch.rand(31).bfloat16()
    packed = keep(weight, density)[1] if density else None
    wanted = ops.path_sweep(weight.contiguous(), a.float(), g.float(), 0.2, mask=packed)
    found = ops.path_sweep(weight, a, g, 0.2, mask=packed)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_path_sweep_of_float64_is_the_reference() -> None:
    weight, a, g = torch.randn(31, 33).double(), torch.rand(33), torch.rand(31)
    x, bits, _ = ops.path_sweep(weight, a, g, 0.1)
    assert x.dtype == torch.float64
    assert torch.equal(x, ops.path_backward(weight, g))
    assert torch.equal(bits, ops.path_sweep(weight.float(), a, g, 0.1)[1])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_path_sweep_of_nothing(shape: tuple[int, int]) -> None:
    x, bits, kept = ops.path_sweep(
        torch.randn(shape), torch.rand(shape[1]), torch.rand(shape[0]), 0
    )
    assert torch.equal(x, torch.zeros(shape[1]))
    assert bits.shape == (0,)
    assert int(kept) == 0


@pytest.mark.parametrize("columns", [700, 4099])
def test_path_sweep_is_the_same_for_any_number_of_threads(columns: int) -> None:
    weight, a, g = torch.randn(1600, columns), torch.rand(columns), torch.rand(1600)
    _, packed = keep(weight, 0.8)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(ops.path_sweep(weight, a, g, 0.4, mask=packed))
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert all(torch.equal(f, w) for f, w in zip(one, found[0], strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_path_sweep_refuses_nan_of_what_is_not_pruned(backend: str) -> None:
    weight, a, g = torch.ones(3, 37), torch.ones(37), torch.ones(3)
    weight[1, 35] = math.nan
    mask = torch.ones(3, 37, dtype=torch.bool)
    mask[1, 35] = False
    with registry.using(backend):
        with pytest.raises(NonFiniteScoreError, match=r"path_sweep: .*head\.weight hold NaN"):
            ops.path_sweep(weight, a, g, 0.5, name="head.weight")
        x, _, kept = ops.path_sweep(weight, a, g, 0.5, mask=ops.pack_mask(mask), name="head.weight")
        assert int(kept) == 110
        assert float(x.sum()) == 110.0
        with pytest.raises(NonFiniteScoreError, match=r"path_sweep"):  # infinity times 0
            ops.path_sweep(torch.full((1, 1), math.inf), torch.zeros(1), torch.ones(1), math.inf)


def test_path_sweep_names_what_is_wrong() -> None:
    weight, a, g = torch.randn(5, 7), torch.rand(7), torch.rand(5)
    with pytest.raises(ValueError, match=r"path_sweep: a must be \[7\] for a weight .*got \(5,\)"):
        ops.path_sweep(weight, g, g, 0.0)
    with pytest.raises(
        ValueError, match=r"path_sweep: g must be \[5\] for a weight .*got \(1, 5\)"
    ):
        ops.path_sweep(weight, a, g[None], 0.0)
    with pytest.raises(ValueError, match=r"weight must be \[out, in\], got shape \(7,\)"):
        ops.path_sweep(weight[0], a, g, 0.0)
    with pytest.raises(ValueError, match=r"power must be 0, 1 or 2, got 3"):
        ops.path_sweep(weight, a, g, 0.0, power=3)
    with pytest.raises(ValueError, match=r"threshold must be a number, got nan"):
        ops.path_sweep(weight, a, g, math.nan)
    with pytest.raises(TypeError, match=r"a must be a float tensor, got torch.int64"):
        ops.path_sweep(weight, a.long(), g, 0.0)
    with pytest.raises(ValueError, match="mask"):
        ops.path_sweep(weight, a, g, 0.0, mask=torch.zeros(4, dtype=torch.uint8))
