"""Path operations of one vector by the CUDA sources, against the reference and bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from paikern import ops
from paikern.backends import cuda_path, registry
from paikern.errors import NonFiniteScoreError
from python_tests.cuda_source import shim
from python_tests.cuda_source.path_calls import (
    DTYPES,
    POWERS,
    both,
    close,
    largest,
    on,
    run_product,
    same_on_all_blocks,
    scale_of,
)
from python_tests.ops.path_cases import keep

pytestmark = pytest.mark.cuda_source

# Rows that begin at 16 bytes and rows that do not; several parts of a row and of a column.
SHAPES = (
    (0, 3), (3, 0), (1, 1), (33, 31), (1, 1000), (300, 33), (17, 128), (31, 1), (5, 2056),
    (9, 2051), (1000, 5), (260, 12), (3000, 12), (2, 12_005),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways_and_the_score(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = keep(weight, 0.4)[1]
    x, g = torch.rand(shape[1]), torch.rand(shape[0])
    for power, masked in POWERS:
        how = {"power": power, "mask": packed if masked else None}
        close(*both(lambda h=how: ops.path_forward(weight, x, **h)))
        close(*both(lambda h=how: ops.path_backward(weight, g, **h)))
        found, wanted = both(lambda h=how: ops.path_score(weight, x, g, pruned=-1.0, **h))
        assert torch.equal(found, wanted)  # each a product of three


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweep_has_the_adjoint_and_the_bits_of_the_cpu(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = keep(weight, 0.4)[1]
    a, g = torch.rand(shape[1]), torch.rand(shape[0])
    for power, masked in POWERS:
        how = {"power": power, "mask": packed if masked else None}
        bound = 0.3 if power else 0.2
        found, wanted = both(lambda h=how, t=bound: ops.path_sweep(weight, a, g, t, **h), "cpu")
        assert torch.equal(found[1], wanted[1])
        assert int(found[2]) == int(wanted[2])
        adjoint = on("cuda_source", lambda h=how: ops.path_backward(weight, g, **h))
        assert torch.equal(found[0], adjoint)
        close(found[0], wanted[0])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(300, 131), (9, 2051), (3000, 12), (2, 12_288)], ids=str)
def test_bits_do_not_depend_on_the_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    mask = keep(weight, 0.4)[1]
    x, g = torch.rand(shape[1]), torch.rand(shape[0])
    same_on_all_blocks(lambda: ops.path_forward(weight, x, mask=mask))
    same_on_all_blocks(lambda: ops.path_backward(weight, g, mask=mask))
    same_on_all_blocks(lambda: ops.path_sweep(weight, x, g, 0.4, mask=mask))
    same_on_all_blocks(lambda: ops.path_score(weight, x, g, mask=mask))


@pytest.mark.parametrize("first", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_vectors_that_begin_anywhere(first: int, dtype: torch.dtype) -> None:
    """A contiguous view does not begin where an allocation does; NaN around it does no harm."""
    room = torch.full((40 * 64 + 20,), math.nan, dtype=dtype)
    for columns in (64, 61):
        weight = room[first : first + 40 * columns].view(40, columns).normal_()
        x, g = torch.rand(columns + first)[first:], torch.rand(40 + first)[first:]
        close(*both(lambda w=weight, v=x: ops.path_forward(w, v)))
        close(*both(lambda w=weight, v=g: ops.path_backward(w, v)))
        found, wanted = both(lambda w=weight, v=x, u=g: ops.path_sweep(w, v, u, 0.3), "cpu")
        assert torch.equal(found[1], wanted[1])


def test_every_fp16_and_bf16_number_is_read_exactly() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        weight = torch.where(every.isnan(), 0.0, every).reshape(-1, 1)
        found = on("cuda_source", lambda w=weight: ops.path_forward(w, torch.ones(1)))
        assert torch.equal(found, weight.float().abs().view(-1))


def test_weights_that_are_not_contiguous() -> None:
    weight, x, g = torch.randn(131, 40).T, torch.rand(131), torch.rand(40)
    close(*both(lambda: ops.path_forward(weight, x)))
    close(*both(lambda: ops.path_backward(weight, g)))


@pytest.mark.parametrize("threshold", [0.1, -math.inf, math.inf, 1e300, -1e300, 0.0, 3.0, 1e-50])
def test_thresholds_are_compared_exactly(threshold: float) -> None:
    weight = torch.tensor([[1.0, 0.0, math.inf], [3.0, 0.1, 2.0]])
    mask = ops.pack_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0)
    ones = torch.ones(3), torch.ones(2)
    found, wanted = both(lambda: ops.path_sweep(weight, *ones, threshold, mask=mask), "cpu")
    assert torch.equal(found[1], wanted[1])
    assert int(found[2]) == int(wanted[2])


def test_nan_counts_but_not_under_the_mask() -> None:
    weight = torch.tensor([[math.nan, 1.0]])
    a, g = torch.ones(2), torch.ones(1)
    kept = ops.pack_mask(torch.tensor([[False, True]]))
    x, bits, _ = on("cuda_source", lambda: ops.path_sweep(weight, a, g, 0.5, mask=kept))
    assert x.tolist() == [0.0, 1.0]
    assert bits.tolist() == [2]
    assert on("cuda_source", lambda: ops.path_forward(weight, a, mask=kept)).tolist() == [1.0]
    assert on("cuda_source", lambda: ops.path_forward(weight, a)).isnan().all()
    with pytest.raises(NonFiniteScoreError, match="the scores of fc hold NaN"):
        on("cuda_source", lambda: ops.path_sweep(weight, a, g, 0.5, name="fc"))


def test_infinite_weights_are_infinitely_many_paths() -> None:
    weight = torch.tensor([[math.inf, 1.0], [-math.inf, 2.0], [3.0, 4.0]]).half()
    found = on("cuda_source", lambda: ops.path_forward(weight, torch.ones(2), power=2))
    assert found.tolist() == [math.inf, math.inf, 25.0]


def test_float64_is_for_the_reference() -> None:
    weight, x = torch.randn(5, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    with registry.using("cuda_source"), pytest.raises(registry.BackendError, match="float64"):
        ops.path_forward(weight, x)


def test_counters_are_back_at_zero() -> None:
    """They are zero between launches, so that the next one may rely on it."""
    held = []
    with pytest.MonkeyPatch.context() as patch:
        zeros = torch.zeros
        patch.setattr(torch, "zeros", lambda *a, **k: held.append(zeros(*a, **k)) or held[-1])
        on("cuda_source", lambda: ops.path_forward(torch.randn(9, 2051), torch.rand(2051)))
    assert [t.numel() for t in held] == [2]
    assert not held[0].any()


@pytest.mark.parametrize("shape", [(70, 131), (9, 2051)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_maps_are_brought_into_range_as_they_are_read(
    on_cpu: shim.OnCpu, shape: tuple[int, int], batch: int
) -> None:
    """Readers take a power of two out, hold counts at their floor and tell the largest result."""
    rows, columns = shape
    weight = torch.randn(shape)
    x, g = torch.rand(batch, columns), torch.rand(batch, rows)
    x.view(-1)[0], g.view(-1)[0] = 1.0, 1.0
    x.view(-1)[1:40] = 2.0**-70
    large, small = x * 2.0**60, g * 2.0**-20
    floored = torch.where((x > 0) & (x < 2.0**-60), 2.0**-60, x)
    for counts, read in ((0, x), (1, floored)):
        scales = (scale_of(large), scale_of(small), scale_of(None))
        z = torch.empty(batch, rows)
        run_product("forward", weight, large, z, scales[0], None, scales[2], counts, on_cpu)
        assert torch.equal(z, on("cuda_source", lambda r=read: ops.path_forward(weight, r)))
        assert largest(scales[2]) == float(z.max())
        scales[2].zero_()
        out = torch.empty(batch, columns)
        run_product("adjoint", weight, out, small, None, scales[1], scales[2], counts, on_cpu)
        wanted = on("cuda_source", lambda: ops.path_backward(weight, g))
        assert torch.equal(out, wanted)
        assert largest(scales[2]) == float(out.max())
        score = torch.empty(shape)
        run_product("score", weight, large, small, *scales[:2], None, counts, on_cpu, score)
        assert torch.equal(score, on("cuda_source", lambda r=read: ops.path_score(weight, r, g)))


def test_the_largest_of_a_map_with_nan_is_nan(on_cpu: shim.OnCpu) -> None:
    weight = torch.tensor([[1.0], [math.nan], [math.inf]])
    top, z = scale_of(None), torch.empty(1, 3)
    run_product("forward", weight, torch.ones(1, 1), z, None, None, top, 0, on_cpu)
    assert math.isnan(largest(top))
    run_product("forward", weight[2:], torch.ones(1, 1), z, None, None, top.zero_(), 0, on_cpu)
    assert largest(top) == math.inf


@pytest.mark.parametrize("first_bit", [0, 3, 8, 131])
def test_a_weight_may_use_some_rows_of_a_mask(on_cpu: shim.OnCpu, first_bit: int) -> None:
    weight, keep_all = torch.randn(40, 33), torch.rand(first_bit + 40 * 33) < 0.5
    packed, own = ops.pack_mask(keep_all), ops.pack_mask(keep_all[first_bit:])
    for batch in (1, 3):
        x, z = torch.rand(batch, 33), torch.empty(batch, 40)
        run_product(
            "forward", weight, x, z, None, None, None, 0, on_cpu, mask=packed, first_bit=first_bit
        )
        wanted = on("cuda_source", lambda v=x: ops.path_forward(weight, v, mask=own))
        assert torch.equal(z, wanted)


def test_derivatives_go_through_the_backend() -> None:
    weight = torch.randn(5, 7, requires_grad=True)
    x = torch.rand(7, requires_grad=True)

    def slopes() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ops.path_forward(weight, x, power=2).sum(), (weight, x))

    for found, wanted in zip(*both(slopes), strict=True):
        close(found, wanted)


def test_large_layers_fill_a_device_and_small_ones_are_not_cut() -> None:
    """132 multiprocessors with several blocks each; partial sums stay below 2 % of the weight."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        for rows, columns in ((8192, 8192), (50257, 768), (1000, 25088), (4096, 16384)):
            geometry = cuda_path.linear_geometry(1, rows, columns)
            for direction in ("forward", "adjoint"):
                room = cuda_path.workspace(direction, geometry, dtype, 1)
                assert room.blocks >= 4 * 132
                assert 4 * room.floats <= 0.02 * rows * columns * size
        small = cuda_path.linear_geometry(1, 100, 100)
        assert cuda_path.workspace("forward", small, dtype, 1).floats == 0
