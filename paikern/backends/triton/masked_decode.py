"""Products with tiles of a packed weight made dense on chip: low sparsity, larger batches.

A tile of the weight comes from the table of `masked_words`: 32 bits of a row, the rank of the first
of them among the values, and the values themselves, consecutive in memory. It is then an operand of
`tl.dot`, with float32 sums and without rounding of operands:

    forward   y[n, r]  = sum over columns of W[r, c] * x[n, c], the weight as the left operand
    input     x'[n, c] = sum over rows of g[n, r] * W[r, c], the weight as the right operand
    kept      g^T x over the batch for a tile; of the result only kept weights are stored, so that
              a dense gradient never exists

A pruned weight is a zero here: NaN or infinity in x spreads as in a dense product.

Few tiles: the sum is cut into parts, as the shape and the batch say, and added up in order by
`masked_join_kernel`. Bytes moved: the values and 1/4 byte a weight for each block of the batch.
Limits: bandwidth for small batches, then the bit counts of the decoding (one a weight and block of
the batch); for large ones the library's product wins. Not yet measured.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import Decode, blocks, config, launch, multiplied
from paikern.backends.triton.masked_words import BITS, Words, kept_in
from paikern.backends.triton.tiles import widen

_FEW = 16  # the least that `tl.dot` multiplies
_SHORT = 8  # steps of a part at least, where there are as many


@triton.jit
def masked_decode_kernel(
    x,
    values,
    bias,
    words,
    ranks,
    out,
    rows,
    columns,
    across,
    batch,
    span,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """out [parts, batch, rows]; grid: blocks of rows * of the batch, parts of `span` words."""
    high = tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % high).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sample = (tl.program_id(0) // high).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    known, there = row < rows, sample < batch
    bit = tl.arange(0, 32)
    first = tl.program_id(1) * span
    total = tl.zeros([ROWS, BATCH], dtype=tl.float32)
    for block in range(first, tl.minimum(first + span, across)):
        at = row * across + block
        kept, place = kept_in(words, ranks, at[:, None], known[:, None], bit[None, :])
        w = tl.load(values + place, mask=kept, other=0.0)
        column = block * 32 + bit
        v = tl.load(
            x + (sample * columns)[None, :] + column[:, None],
            mask=there[None, :] & (column < columns)[:, None],
            other=0.0,
        )
        total = tl.dot(w, v, total, input_precision="ieee")
    if BIAS:
        total += widen(tl.load(bias + row, mask=known, other=0.0))[:, None]
    to = (tl.program_id(1).to(tl.int64) * batch + sample) * rows
    inside = known[:, None] & there[None, :]
    tl.store(out + to[None, :] + row[:, None], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def masked_decode_input_kernel(
    g,
    values,
    words,
    ranks,
    out,
    rows,
    columns,
    across,
    batch,
    span,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """out [parts, batch, columns]; grid: words * blocks of the batch, parts of `span` steps."""
    block = (tl.program_id(0) % across).to(tl.int64)
    sample = (tl.program_id(0) // across).to(tl.int64) * BATCH + tl.arange(0, BATCH)
    there = sample < batch
    bit = tl.arange(0, 32)
    first = tl.program_id(1) * span
    total = tl.zeros([BATCH, 32], dtype=tl.float32)
    for step in range(first, tl.minimum(first + span, tl.cdiv(rows, ROWS))):
        row = step * ROWS + tl.arange(0, ROWS).to(tl.int64)
        known = row < rows
        at = row * across + block
        kept, place = kept_in(words, ranks, at[:, None], known[:, None], bit[None, :])
        w = tl.load(values + place, mask=kept, other=0.0)
        u = tl.load(
            g + (sample * rows)[:, None] + row[None, :],
            mask=there[:, None] & known[None, :],
            other=0.0,
        )
        total = tl.dot(u, w, total, input_precision="ieee")
    column = block * 32 + bit
    to = (tl.program_id(1).to(tl.int64) * batch + sample) * columns
    inside = there[:, None] & (column < columns)[None, :]
    tl.store(out + to[:, None] + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def masked_decode_kept_kernel(
    g,
    x,
    words,
    ranks,
    out,
    rows,
    columns,
    across,
    batch,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BATCH: tl.constexpr,
):
    """out [kept]; grid: blocks of rows * blocks of columns."""
    wide = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // wide).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % wide).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for step in range(tl.cdiv(batch, BATCH)):
        sample = step * BATCH + tl.arange(0, BATCH).to(tl.int64)
        there = sample < batch
        left = tl.load(
            g + (sample * rows)[None, :] + row[:, None],
            mask=there[None, :] & (row < rows)[:, None],
            other=0.0,
        )
        right = tl.load(
            x + (sample * columns)[:, None] + column[None, :],
            mask=there[:, None] & (column < columns)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (row * across)[:, None] + (column // 32)[None, :]
    kept, place = kept_in(words, ranks, at, inside, (column % 32).to(tl.int32)[None, :])
    tl.store(out + place, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def masked_join_kernel(
    parts, bias, out, number, rows, count, BIAS: tl.constexpr, TILE: tl.constexpr
):
    """out [batch, rows]: `count` parts one after the other, then the bias."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < number
    total = tl.zeros([TILE], dtype=tl.float32)
    at = index
    for _ in range(count):
        total += tl.load(parts + at, mask=inside, other=0.0)
        at += number
    if BIAS:
        total += widen(tl.load(bias + index % rows, mask=inside, other=0.0))
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def _sizes(batch: int) -> Decode:
    return config().decode_few if batch <= _FEW else config().decode


def _span(steps: int, programs: int, sizes: Decode) -> int:
    """Steps of a part, so that there are enough programs but no short parts."""
    parts = min(blocks(sizes.programs, programs), max(1, steps // _SHORT))
    return blocks(steps, parts)


def product(table: Words, values: Tensor, x: Tensor, rows: int, bias: Tensor | None) -> Tensor:
    """x [batch, columns] times the transpose of the weight, and the bias: [batch, rows]."""
    (batch, columns), sizes = x.shape, _sizes(x.shape[0])
    x, values, kind = multiplied(x), multiplied(values), x.dtype
    programs = blocks(rows, sizes.rows) * blocks(batch, sizes.batch)
    span = _span(table.across, programs, sizes)
    parts = _parts(x, blocks(table.across, span), rows)
    add = values if bias is None else bias.contiguous()
    launch(
        masked_decode_kernel, (programs, parts.shape[0]), x, x, values, add, table.words,
        table.ranks, parts, rows, columns, table.across, batch, span,
        BIAS=bias is not None and parts.shape[0] == 1, ROWS=sizes.rows, BATCH=sizes.batch,
        warps=sizes.warps, fused=True,
    )  # fmt: skip
    return _joined(parts, x, bias).to(kind)


def product_input(table: Words, values: Tensor, g: Tensor, columns: int) -> Tensor:
    """g [batch, rows] times the weight: [batch, columns]."""
    (batch, rows), sizes = g.shape, _sizes(g.shape[0])
    g, values, kind = multiplied(g), multiplied(values), g.dtype
    programs = table.across * blocks(batch, sizes.batch)
    steps = blocks(rows, sizes.rows)
    span = _span(steps, programs, sizes)
    parts = _parts(g, blocks(steps, span), columns)
    launch(
        masked_decode_input_kernel, (programs, parts.shape[0]), g, g, values, table.words,
        table.ranks, parts, rows, columns, table.across, batch, span, ROWS=sizes.rows,
        BATCH=sizes.batch, warps=sizes.warps, fused=True,
    )  # fmt: skip
    return _joined(parts, g, None).to(kind)


def gradient(table: Words, g: Tensor, x: Tensor, kept: int) -> Tensor:
    """g [batch, rows] and x [batch, columns]: [kept]."""
    (batch, rows), columns, sizes = g.shape, x.shape[1], _sizes(g.shape[0])
    g, x, kind = multiplied(g), multiplied(x), g.dtype
    out = g.new_empty(kept)
    launch(
        masked_decode_kept_kernel, (blocks(rows, sizes.rows) * blocks(columns, sizes.columns),), g,
        g, x, table.words, table.ranks, out, rows, columns, table.across, batch, ROWS=sizes.rows,
        COLUMNS=sizes.columns, BATCH=min(sizes.batch, BITS), warps=sizes.warps, fused=True,
    )  # fmt: skip
    return out.to(kind)


def _parts(x: Tensor, count: int, width: int) -> Tensor:
    kind = x.dtype if count == 1 else torch.float32
    return x.new_empty((count, x.shape[0], width), dtype=kind)


def _joined(parts: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    count, batch, rows = parts.shape
    if count == 1:
        return parts[0]
    out = x.new_empty(batch, rows)
    tile, warps = 8 * config().pattern.rows, config().pattern.warps
    add = x if bias is None else bias.contiguous()
    launch(
        masked_join_kernel, (blocks(out.numel(), tile),), x, parts, add, out, out.numel(), rows,
        count, BIAS=bias is not None, TILE=tile, warps=warps,
    )  # fmt: skip
    return out
