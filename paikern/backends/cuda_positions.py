"""Positions of packed weights by CUDA (csrc/cuda/masked_positions.cuh), and packed to dense."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paikern.backends import reference_masked_linear as reference
from paikern.backends.cuda_launch import Step, elementwise, run

__all__ = [
    "Packed",
    "gather_kept",
    "list_positions",
    "listed",
    "scatter_kept",
    "transpose_positions",
]

WARPS = 8  # of a block
_HIGH = 64  # rows that a block sorts, one after the other
_CELLS = 1 << 22  # of columns and blocks of rows at most, unless one block has all of a column
_COLUMNS = 1 << 16  # that 16 bits can tell apart
_FILL = (256, 1 << 15)  # bytes of a panel that a block makes dense in shared memory
_WORDS = (1, 2, 4, 8)  # bytes of values that are moved


class Packed(NamedTuple):
    """What the kernels begin with (PaikernPacked)."""

    values: Tensor | None
    source: Tensor | None
    positions: Tensor  # int16 columns
    starts: Tensor
    rows: int
    columns: int
    panel: int
    kept: int

    def arguments(self) -> tuple[int, ...]:
        places = (self.values, self.source, self.positions, self.starts)
        addresses = (0 if t is None else t.data_ptr() for t in places)
        return (*addresses, self.rows, self.columns, self.panel, self.kept)


def ceil(count: int, size: int) -> int:
    return -(-count // size)


def _by_panel(kernel: str, rows: int, columns: int, panel: int, *arguments: int) -> Step:
    """A warp for each panel of each row."""
    return Step(kernel, ceil(rows * ceil(columns, panel), WARPS), arguments)


def list_positions(
    mask: Tensor, kept: int, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor]:
    mask, cells = mask.contiguous(), rows * ceil(columns, panel)
    if cells == 0:
        starts = mask.new_zeros(cells + 1, dtype=torch.int32)
    else:
        starts = mask.new_empty(cells + 1, dtype=torch.int32)
        shape = (rows, columns, panel)
        count = (mask.data_ptr(), *shape, starts.data_ptr())
        steps = [
            _by_panel("paikern_masked_count", *shape, *count),
            Step("paikern_masked_scan", 1, (starts.data_ptr(), cells + 1), 1024),
        ]
        run(mask, steps)
    if int(starts[-1]) != kept:
        raise ValueError(f"list_positions: {int(starts[-1])} bits are set, kept says {kept}")
    return _positions(mask, starts, rows, columns, panel, kept), starts


def _positions(
    mask: Tensor, starts: Tensor, rows: int, columns: int, panel: int, kept: int
) -> Tensor:
    positions = mask.new_empty(kept, dtype=torch.int16)
    if kept:
        places = (mask.data_ptr(), starts.data_ptr())
        shape = (rows, columns, panel)
        step = _by_panel("paikern_masked_list", *shape, *places, *shape, positions.data_ptr())
        run(mask, [step])
    return positions


def listed(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int, kept: int
) -> Tensor:
    """16-bit columns, also of a bitmap: for the length of a call. Nothing is waited for."""
    if positions.dtype == torch.int16:
        return positions.contiguous()
    return _positions(positions.contiguous(), starts, rows, columns, panel, kept)


def transpose_positions(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    positions, starts = positions.contiguous(), starts.contiguous()
    kept, t_panels = positions.numel(), ceil(rows, panel)
    moved, source = torch.empty_like(positions), starts.new_empty(kept)
    if kept == 0:
        return moved, starts.new_zeros(columns * t_panels + 1), source
    begins = starts.new_empty(columns * t_panels + 1)
    high = max(_HIGH, ceil(rows, max(1, _CELLS // columns)))
    blocks = ceil(rows, high)
    counts = starts.new_zeros(columns * blocks + 1)
    packed = Packed(None, None, positions, starts, rows, columns, panel, kept).arguments()
    at = counts.data_ptr()
    found = (moved.data_ptr(), source.data_ptr())
    ends = (at, blocks, source.data_ptr(), begins.data_ptr())
    shape = (starts.data_ptr(), rows, columns, panel)
    steps = [
        Step("paikern_masked_columns", blocks, (*packed, high, at)),
        Step("paikern_masked_scan", 1, (at, counts.numel()), 1024),
        Step("paikern_masked_transpose", blocks, (*packed, high, at, *found)),
        elementwise("paikern_masked_t_starts", begins.numel(), *shape, *ends),
    ]
    run(positions, steps)
    return moved, begins, source


def scatter_kept(
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> Tensor:
    size = values.element_size()
    if size not in _WORDS:
        return reference.scatter_kept(values, positions, starts, rows, columns, panel, kept)
    where = (positions.contiguous(), starts.contiguous(), rows, columns, panel, kept)
    values, line = values.contiguous(), ceil(min(panel, columns) * size, 16) * 16
    if kept == 0 or (positions.dtype == torch.int16 and not _FILL[0] <= line <= _FILL[1]):
        dense = values.new_zeros(rows, columns)
    else:
        dense = values.new_empty(rows, columns)
        if positions.dtype == torch.int16:
            packed = Packed(None, None, *where).arguments()
            more = (size, dense.data_ptr(), values.data_ptr())
            blocks = rows * ceil(columns, panel)
            run(values, [Step("paikern_masked_fill", blocks, (*packed, *more), shared=line)])
            return dense
    _move(values, dense, where, 0, rows, scatter=True)
    return dense


def gather_kept(
    dense: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> Tensor:
    if dense.element_size() not in _WORDS:
        return reference.gather_kept(dense, positions, starts, rows, columns, panel, kept)
    values = dense.new_empty(kept)
    where = (positions.contiguous(), starts.contiguous(), rows, columns, panel, kept)
    gather_rows(dense.contiguous(), values, where, 0)
    return values


Where = tuple[Tensor, Tensor, int, int, int, int]
"""positions, starts, rows, columns, panel, kept; the tensors contiguous."""


def gather_rows(dense: Tensor, values: Tensor, where: Where, top: int) -> None:
    """Writes the kept values of the rows from `top` on, of which `dense` `[some, columns]` is."""
    _move(values, dense, where, top, dense.shape[0], scatter=False)


def _move(
    values: Tensor, dense: Tensor, where: Where, top: int, count: int, *, scatter: bool
) -> None:
    positions, starts, rows, columns, panel, kept = where
    if kept == 0 or count == 0:
        return
    last = min(rows, top + count)
    way = (int(scatter), values.element_size(), top, dense.data_ptr(), values.data_ptr())
    if positions.dtype == torch.uint8:
        places = (positions.data_ptr(), starts.data_ptr(), last, columns, panel)
        step = _by_panel("paikern_masked_move_bits", last - top, columns, panel, *places, *way)
    else:
        packed = Packed(None, None, positions, starts, last, columns, panel, kept).arguments()
        step = Step("paikern_masked_move", ceil(last - top, WARPS), (*packed, *way))
    run(dense, [step])
