"""Products with a packed weight, kept weight by kept weight: high sparsity, or few rows of x.

    few rows of x:  y[n, r] = sum over the entries of row r of value * x[n, column]. A program has
                    some rows and goes along their entries, or along the bits of a bitmap, for all
                    n at once; x is gathered.
    more:           x transposed once, [columns, batch]: an entry then reads whole lines of it. A
                    program has a few rows and a block of the batch.
    gradient:       out[i] = sum over n of g[n, row of i] * x[n, column of i], both transposed. A
                    program has a block of entries, whose rows it finds by bisection of the starts.

The transposed weight has positions of its own and reads the values through `source`. Sums are
float32, each in one program and one order: no atomics.

Bytes moved: value and position of each entry once for few rows, once for each block of the batch
otherwise, and the lines of x that they name, most of them out of the caches. Limits: bandwidth; for
many rows of x the reads of those lines.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import blocks, config, launch, stored
from paikern.backends.triton.masked_words import COLUMNS, panels_of
from paikern.backends.triton.tiles import bit_at, widen

FEW = 4  # rows of x that are gathered
_LINE = 16  # elements, to which a transposed line is filled up: aligned reads


@triton.jit
def masked_few_kernel(
    x,
    values,
    bias,
    positions,
    starts,
    source,
    out,
    rows,
    columns,
    panels,
    group,
    batch,
    SOURCE: tl.constexpr,
    BIAS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """out [batch, rows]; `group` panels have the same multiple of 65,536."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    sample = tl.arange(0, BATCH).to(tl.int64)
    there = sample < batch
    total = tl.zeros([ROWS, BATCH, LANES], dtype=tl.float32)
    for panel in range(0, panels, group):
        cell = starts + row * panels + panel
        begin = tl.load(cell, mask=known, other=0)
        end = tl.load(cell + tl.minimum(group, panels - panel), mask=known, other=0)
        line = x + (sample * columns)[None, :, None] + panel // group * 65536
        for step in range(tl.cdiv(tl.max(end - begin, 0), LANES)):
            lane = step * LANES + tl.arange(0, LANES)
            entry = begin.to(tl.int64)[:, None] + lane[None, :]
            inside = entry < end[:, None]
            low = tl.load(positions + entry, mask=inside, other=0).to(tl.int32) & 0xFFFF
            if SOURCE:
                entry = tl.load(source + entry, mask=inside, other=0).to(tl.int64)
            w = widen(tl.load(values + entry, mask=inside, other=0.0))
            v = tl.load(
                line + low[:, None, :], mask=inside[:, None, :] & there[None, :, None], other=0.0
            )
            total += w[:, None, :] * widen(v)
    y = tl.sum(total, 2)
    if BIAS:
        y += widen(tl.load(bias + row, mask=known, other=0.0))[:, None]
    to = out + (sample * rows)[None, :] + row[:, None]
    tl.store(to, y.to(out.dtype.element_ty), mask=known[:, None] & there[None, :])


@triton.jit
def masked_few_bits_kernel(
    x,
    values,
    bias,
    bits,
    starts,
    out,
    rows,
    columns,
    panels,
    batch,
    BIAS: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """out [batch, rows], of a bitmap."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    sample = tl.arange(0, BATCH).to(tl.int64)
    there = sample < batch
    entry = tl.load(starts + row * panels, mask=known, other=0)
    total = tl.zeros([ROWS, BATCH, LANES], dtype=tl.float32)
    for step in range(tl.cdiv(columns, LANES)):
        column = step * LANES + tl.arange(0, LANES)
        inside = known[:, None] & (column < columns)[None, :]
        kept = inside & bit_at(bits, (row * columns)[:, None] + column[None, :], inside)
        upto = tl.cumsum(kept.to(tl.int32), 1)
        w = widen(tl.load(values + entry[:, None] + upto - 1, mask=kept, other=0.0))
        at = (sample * columns)[:, None] + column[None, :]
        v = tl.load(x + at, mask=there[:, None] & (column < columns)[None, :], other=0.0)
        # A pruned weight multiplies nothing, NaN neither.
        total += tl.where(kept[:, None, :], w[:, None, :] * widen(v)[None, :, :], 0.0)
        entry += tl.sum(kept.to(tl.int32), 1)
    y = tl.sum(total, 2)
    if BIAS:
        y += widen(tl.load(bias + row, mask=known, other=0.0))[:, None]
    to = out + (sample * rows)[None, :] + row[:, None]
    tl.store(to, y.to(out.dtype.element_ty), mask=known[:, None] & there[None, :])


@triton.jit
def masked_lines_kernel(
    x,
    values,
    bias,
    positions,
    starts,
    source,
    out,
    rows,
    panels,
    group,
    batch,
    pitch,
    SOURCE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BATCH: tl.constexpr,
):
    """x [columns, pitch] transposed; grid: blocks of rows, side by side, * of the batch."""
    high = tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sample = (tl.program_id(0) // high).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    known, there = row < rows, sample < pitch
    total = tl.zeros([ROWS, ENTRIES, BATCH], dtype=tl.float32)
    for panel in range(0, panels, group):
        cell = starts + row * panels + panel
        begin = tl.load(cell, mask=known, other=0)
        end = tl.load(cell + tl.minimum(group, panels - panel), mask=known, other=0)
        first = panel // group * 65536
        for step in range(tl.cdiv(tl.max(end - begin, 0), ENTRIES)):
            lane = step * ENTRIES + tl.arange(0, ENTRIES)
            entry = begin.to(tl.int64)[:, None] + lane[None, :]
            inside = entry < end[:, None]
            low = tl.load(positions + entry, mask=inside, other=0).to(tl.int32) & 0xFFFF
            if SOURCE:
                entry = tl.load(source + entry, mask=inside, other=0).to(tl.int64)
            w = widen(tl.load(values + entry, mask=inside, other=0.0))
            at = ((first + low).to(tl.int64) * pitch)[:, :, None] + sample[None, None, :]
            v = tl.load(x + at, mask=inside[:, :, None] & there[None, None, :], other=0.0)
            total += w[:, :, None] * widen(v)
    y = tl.sum(total, 1)
    if BIAS:
        y += widen(tl.load(bias + row, mask=known, other=0.0))[:, None]
    to = out + (sample * rows)[None, :] + row[:, None]
    tl.store(to, y.to(out.dtype.element_ty), mask=known[:, None] & (sample < batch)[None, :])


@triton.jit
def masked_entries_kernel(
    g,
    x,
    positions,
    starts,
    out,
    number,
    panels,
    group,
    cells,
    steps,
    pitch,
    ENTRIES: tl.constexpr,
    BATCH: tl.constexpr,
):
    """g [rows, pitch] and x [columns, pitch] transposed; `steps` of bisection end it in `cells`."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < number
    low = entry * 0
    high = low + cells
    for _ in range(steps):
        open_ = inside & (low < high)
        middle = (low + high) // 2
        before = tl.load(starts + 1 + middle, mask=open_, other=0) <= entry
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    row = low // panels
    first = (low - row * panels) // group * 65536
    column = first + (tl.load(positions + entry, mask=inside, other=0).to(tl.int32) & 0xFFFF)
    total = tl.zeros([ENTRIES, BATCH], dtype=tl.float32)
    for step in range(tl.cdiv(pitch, BATCH)):
        sample = step * BATCH + tl.arange(0, BATCH)
        there = inside[:, None] & (sample < pitch)[None, :]
        left = tl.load(g + (row * pitch)[:, None] + sample[None, :], mask=there, other=0.0)
        right = tl.load(x + (column * pitch)[:, None] + sample[None, :], mask=there, other=0.0)
        total += widen(left) * widen(right)
    tl.store(out + entry, tl.sum(total, 1).to(out.dtype.element_ty), mask=inside)


class Entries(NamedTuple):
    """A packed weight, or its transpose, by entries: a row has those between its starts."""

    values: Tensor
    positions: Tensor
    starts: Tensor
    source: Tensor | None
    rows: int
    columns: int
    panel: int

    @property
    def panels(self) -> int:
        return panels_of(self.columns, self.panel)

    @property
    def group(self) -> int:
        """Panels that go through at once: positions are modulo 65,536."""
        return max(1, COLUMNS // self.panel)


def product(v: Entries, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [batch, columns] times the transpose of v, and the bias: [batch, rows]."""
    batch, sizes = x.shape[0], config().packed
    out = x.new_empty(batch, v.rows, dtype=stored(x.dtype))
    add = v.values if bias is None else bias.contiguous()
    if v.positions.dtype == torch.uint8:
        launch(
            masked_few_bits_kernel, (blocks(v.rows, sizes.rows),), x, x, v.values, add,
            v.positions, v.starts, out, v.rows, v.columns, v.panels, batch, BIAS=bias is not None,
            BATCH=triton.next_power_of_2(batch), ROWS=sizes.rows, LANES=sizes.lanes,
            warps=sizes.warps, fused=True,
        )  # fmt: skip
        return out.to(x.dtype)
    where = (v.positions, v.starts, v.starts if v.source is None else v.source)
    flags = {"SOURCE": v.source is not None, "BIAS": bias is not None, "fused": True}
    if batch <= FEW:
        launch(
            masked_few_kernel, (blocks(v.rows, sizes.rows),), x, x, v.values, add, *where, out,
            v.rows, v.columns, v.panels, v.group, batch, BATCH=triton.next_power_of_2(batch),
            ROWS=sizes.rows, LANES=sizes.lanes, warps=sizes.warps, **flags,
        )  # fmt: skip
        return out.to(x.dtype)
    lines = transposed(x)
    entries, wide = _tile(lines.shape[1])
    launch(
        masked_lines_kernel, (blocks(v.rows, sizes.lines) * blocks(batch, wide),), x, lines,
        v.values, add, *where, out, v.rows, v.panels, v.group, batch, lines.shape[1],
        ROWS=sizes.lines, ENTRIES=entries, BATCH=wide, warps=sizes.warps, **flags,
    )  # fmt: skip
    return out.to(x.dtype)


def gradient(v: Entries, g: Tensor, x: Tensor, kept: int) -> Tensor:
    """g [batch, rows] and x [batch, columns]: [kept]."""
    lines_of_g, lines, sizes = transposed(g), transposed(x), config().packed
    out, cells = g.new_empty(kept, dtype=stored(g.dtype)), v.rows * v.panels
    entries, wide = _tile(lines.shape[1])
    launch(
        masked_entries_kernel, (blocks(kept, entries),), g, lines_of_g, lines, v.positions,
        v.starts, out, kept, v.panels, v.group, cells, cells.bit_length(), lines.shape[1],
        ENTRIES=entries, BATCH=wide, warps=sizes.warps, fused=True,
    )  # fmt: skip
    return out.to(x.dtype)


def transposed(x: Tensor) -> Tensor:
    """x [batch, width] as [width, batch], filled up with zeros to lines of a multiple of 16."""
    batch, width = x.shape
    lines = x.new_zeros(width, blocks(batch, _LINE) * _LINE)
    lines[:, :batch] = x.T
    return lines


def _tile(pitch: int) -> tuple[int, int]:
    """Entries and rows of x at once: narrower batches, more entries."""
    sizes = config().packed
    wide = min(sizes.batch, triton.next_power_of_2(pitch))
    return sizes.entries * sizes.batch // wide, wide
