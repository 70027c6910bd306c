"""Positions of packed weights by the CUDA sources: those of the CPU, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import ops
from paikern.backends import cuda_positions, registry

pytestmark = pytest.mark.cuda_source
PANELS = [1, 4, 64, 4096, 65_536]


def equal_everywhere(mask: torch.Tensor, panel: int) -> None:
    """list_positions and transpose_positions of a mask on the CUDA sources and on the CPU."""
    rows, columns = mask.shape
    bits, kept = ops.pack_mask(mask), int(mask.sum())
    with registry.using("cuda_source"):
        found = ops.list_positions(bits, kept, rows, columns, panel)
        turned = ops.transpose_positions(*found, rows, columns, panel)
    wanted = ops.list_positions(bits, kept, rows, columns, panel)
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, turned, ops.transpose_positions(*wanted, rows, columns, panel)))
    assert [t.dtype for t in (*found, *turned)] == [
        torch.int16, torch.int32, torch.int16, torch.int32, torch.int32,
    ]  # fmt: skip


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 300), st.integers(0, 300), st.floats(0, 1), st.sampled_from(PANELS))
def test_positions_are_those_of_the_cpu(
    rows: int, columns: int, density: float, panel: int
) -> None:
    equal_everywhere(torch.rand(rows, columns) < density, panel)


@pytest.mark.parametrize("panel", [4096, 65_536])
@pytest.mark.parametrize("shape", [(3, 70_000), (70_000, 3), (2, 65_536)], ids=str)
def test_more_columns_or_rows_than_16_bits(shape: tuple[int, int], panel: int) -> None:
    equal_everywhere(torch.rand(shape) < 0.02, panel)


def test_blocks_of_rows_grow_where_counts_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_positions, "_CELLS", 300)
    monkeypatch.setattr(cuda_positions, "_HIGH", 2)
    equal_everywhere(torch.rand(70, 90) < 0.3, 16)  # 24 rows a block


def test_another_number_of_bits_is_refused() -> None:
    bits = ops.pack_mask(torch.ones(3, 5, dtype=torch.bool))
    with (
        registry.using("cuda_source"),
        pytest.raises(ValueError, match="15 bits are set, kept says 14"),
    ):
        ops.list_positions(bits, 14, 3, 5, 4)


DTYPES = (
    torch.bool, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.int64,
    torch.float64, torch.complex128,
)  # fmt: skip


@pytest.mark.parametrize("bitmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("panel", PANELS)
def test_scatter_kept_and_gather_kept(dtype: torch.dtype, panel: int, bitmap: bool) -> None:
    shapes = (33, 131), (6, 640), (5, 40), (7, 9), (0, 4)
    for shape, density in zip(shapes, (0.3, 0.2, 0.0, 1.0, 1.0), strict=True):
        mask = torch.rand(shape) < density
        bits, kept = ops.pack_mask(mask), int(mask.sum())
        positions, starts = ops.list_positions(bits, kept, *shape, panel)
        where = (bits if bitmap else positions, starts, *shape, panel, kept)
        dense = (torch.randn(shape) * 10).to(dtype)
        with registry.using("cuda_source"):
            values = ops.gather_kept(dense.T.contiguous().T, *where)
            again = ops.scatter_kept(values, *where)
        assert torch.equal(values, dense[mask])
        assert torch.equal(again, torch.where(mask, dense, torch.zeros_like(dense)))


@pytest.mark.parametrize("bitmap", [False, True])
def test_moving_with_more_columns_than_16_bits(bitmap: bool) -> None:
    mask = torch.rand(3, 70_001) < 0.05
    bits, kept = ops.pack_mask(mask), int(mask.sum())
    positions, starts = ops.list_positions(bits, kept, *mask.shape)
    where = (bits if bitmap else positions, starts, *mask.shape, 4096, kept)
    dense = torch.randn(mask.shape)
    with registry.using("cuda_source"):
        values = ops.gather_kept(dense, *where)
        again = ops.scatter_kept(values, *where)
    assert torch.equal(values, dense[mask])
    assert torch.equal(again, dense * mask)


@pytest.mark.parametrize("panel", [16_384, 65_536])
def test_a_panel_that_does_not_fit_shared_memory(panel: int) -> None:
    for dtype in (torch.int8, torch.float16):
        mask = torch.rand(2, 66_000) < 0.01
        bits, kept = ops.pack_mask(mask), int(mask.sum())
        where = (*ops.list_positions(bits, kept, *mask.shape, panel), *mask.shape, panel, kept)
        dense = torch.randint(-9, 9, mask.shape).to(dtype)
        with registry.using("cuda_source"):
            assert torch.equal(ops.scatter_kept(dense[mask], *where), dense * mask)


def test_derivatives_are_each_other() -> None:
    mask = torch.rand(4, 6) < 0.5
    bits, kept = ops.pack_mask(mask), int(mask.sum())
    where = (*ops.list_positions(bits, kept, 4, 6), 4, 6, 4096, kept)
    values = torch.randn(kept, requires_grad=True)
    weights = torch.randn(4, 6)
    with registry.using("cuda_source"):
        (ops.scatter_kept(values, *where) * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights[mask])
