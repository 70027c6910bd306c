"""path_forward, path_backward and path_sweep of one vector: V x, V^T g, and the bits with it.

    V = |W|**p * M, W [rows, columns], M packed bits
    forward:  z[o] = sum_i V[o, i] * x[i]
    adjoint:  x[i] = sum_o V[o, i] * g[o]
    sweep:    the adjoint, and ((|w|**p) * a[i]) * g[o] > threshold as bits, in the same read

Bytes moved: the weight once, numel / 8 for a mask, numel / 8 for bits. The adjoint adds one row in
`rows * steps` of partial sums. Limit: memory bandwidth.

Sums have one order. Forward: each program adds column blocks in registers, then across; with few
rows the columns are split and the parts added one after the other. Adjoint: a thread adds down its
column, every `rows`-th row, and a second kernel adds those sums one after the other. No sum crosses
threads there, so that path_sweep, which stores bits as well, has the bits of path_backward whatever
layout the compiler picks.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.errors import refuse_nan
from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.tiles import bit_at, kept_values, lines, packed

_ENOUGH = 512  # programs, from which on a weight is not cut further
_SHORT = 8  # steps at least, where there are as many: each chunk costs a write of partial sums


@triton.jit
def path_forward_kernel(
    weight,
    mask,
    x,
    out,
    rows,
    columns,
    span,
    POWER: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[split, o]: the sums over columns split * span .. of ROWS rows; span is in columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1).to(tl.int64)
    first = split * span
    end = tl.minimum(first + span, columns)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in range(tl.cdiv(end - first, COLUMNS)):
        column = first + block * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < end)[None, :]
        index = row[:, None] * columns + column[None, :]
        values = kept_values(weight, mask, index, inside, POWER, MASKED)
        total += values * tl.load(x + column, mask=column < end, other=0.0)[None, :]
    tl.store(out + split * rows + row, tl.sum(total, 1), mask=row < rows)


@triton.jit
def path_adjoint_kernel(
    weight,
    mask,
    a,
    g,
    threshold,
    out,
    bits,
    found,
    rows,
    columns,
    pitch,
    steps,
    POWER: tl.constexpr,
    MASKED: tl.constexpr,
    SWEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[chunk * ROWS + r, i]: the sums over the rows of a chunk that are r modulo ROWS.

    SWEEP: bits, rows `pitch` bytes apart; found[0] counts them, found[1] is set where a score is
    NaN.
    """
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inner = column < columns
    lane = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if SWEEP:
        left = tl.load(a + column, mask=inner, other=0.0)
        kept = tl.zeros([ROWS], dtype=tl.int32)
        bad = tl.zeros([ROWS], dtype=tl.int32)
        byte = tl.program_id(1).to(tl.int64) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    for step in range(steps):
        row = (chunk * steps + step) * ROWS + lane
        inside = (row < rows)[:, None] & inner[None, :]
        index = row[:, None] * columns + column[None, :]
        right = tl.load(g + row, mask=row < rows, other=0.0)
        values = kept_values(weight, mask, index, inside, POWER, MASKED)
        total += values * right[:, None]
        if SWEEP:
            scores = (values * left[None, :]) * right[:, None]
            ranked = inside
            if MASKED:
                ranked = inside & bit_at(mask, index, inside)
            bad = tl.maximum(bad, tl.max((ranked & (scores != scores)).to(tl.int32), 1))
            above = (ranked & (scores > threshold)).to(tl.int32)
            kept += tl.sum(above, 1)
            word = tl.reshape(above, (ROWS, COLUMNS // 8, 8)) << tl.arange(0, 8)[None, None, :]
            tl.store(
                bits + row[:, None] * pitch + byte[None, :],
                tl.sum(word, 2).to(tl.uint8),
                mask=(row < rows)[:, None] & (byte < pitch)[None, :],
            )
    at = (chunk * ROWS + lane)[:, None] * columns + column[None, :]
    tl.store(out + at, total, mask=(lane >= 0)[:, None] & inner[None, :])
    if SWEEP:
        tl.atomic_add(found, tl.sum(kept, 0).to(tl.int64), sem="relaxed")
        if tl.max(bad, 0) > 0:
            tl.store(found + 1, 1)


@triton.jit
def add_rows_kernel(parts, out, count, columns, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., one after the other."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], dtype=tl.float32)
    at = column
    for _ in range(count):
        total += tl.load(parts + at, mask=inside, other=0.0)
        at += columns
    tl.store(out + column, total, mask=inside)


@triton.jit
def join_rows_kernel(lined, out, numel, columns, pitch, ROWS: tl.constexpr):
    """Bits whose rows begin at a byte each -> bits of the whole matrix one after the other."""
    start = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    local, byte = lines(ROWS), tl.arange(0, ROWS)
    left = numel - start
    inside = local < left
    index = start + local
    row = index // columns
    bits = inside & bit_at(lined, row * (8 * pitch) + index - row * columns, inside)
    tl.store(out + start // 8 + byte, packed(bits), mask=byte * 8 < left)


def as_float(tensor: Tensor) -> Tensor:
    """A float32 tensor that kernels may address from its first element."""
    return tensor.detach().to(torch.float32).contiguous()


def as_weight(weight: Tensor, power: int) -> Tensor:
    """Power 0 reads no weight: it may be of any type then."""
    return weight.detach().contiguous() if power else weight.detach()


def as_mask(mask: Tensor | None, instead: Tensor) -> Tensor:
    return instead if mask is None else mask.contiguous()


def forward(weight: Tensor, x: Tensor, power: int, mask: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    z = x.new_empty(rows, dtype=torch.float32)
    if z.numel() == 0 or columns == 0:
        return z.zero_()
    tile = config().forward
    groups = blocks(rows, tile.rows)
    most = blocks(columns, tile.columns * tile.steps)
    splits = min(most, blocks(_ENOUGH, groups))
    span = blocks(blocks(columns, tile.columns), splits) * tile.columns
    splits = blocks(columns, span)
    held, vector = as_weight(weight, power), as_float(x)
    parts = z if splits == 1 else z.new_empty(splits, rows)
    launch(
        path_forward_kernel, (groups, splits), held, held, as_mask(mask, held), vector, parts, rows,
        columns, span, POWER=power, MASKED=mask is not None, ROWS=tile.rows, COLUMNS=tile.columns,
        warps=tile.warps,
    )  # fmt: skip
    if splits > 1:
        _add_rows(parts, z)
    return z


def backward(weight: Tensor, g: Tensor, power: int, mask: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    x = g.new_empty(columns, dtype=torch.float32)
    if x.numel() == 0 or rows == 0:
        return x.zero_()
    nothing = x.new_empty(0, dtype=torch.int64)
    _adjoint(weight, x, x, as_float(g), 0.0, power, mask, x, nothing, False)
    return x


def path_sweep(
    weight: Tensor, a: Tensor, g: Tensor, threshold: float, power: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    numel = weight.numel()
    x = g.new_empty(columns, dtype=torch.float32)
    bits = weight.new_empty((numel + 7) // 8, dtype=torch.uint8)
    found = torch.zeros(2, dtype=torch.int64, device=weight.device)
    if numel == 0:
        return x.zero_(), bits, found[0]
    pitch = blocks(columns, 8)
    lined = bits if columns % 8 == 0 else bits.new_empty(rows * pitch)
    bound = _floor32(threshold)
    _adjoint(weight, as_float(a), lined, as_float(g), bound, power, mask, x, found, True)
    if lined is not bits:
        tile = config().flat
        launch(
            join_rows_kernel, (blocks(numel, 8 * tile.rows),), bits, lined, bits, numel, columns,
            pitch, ROWS=tile.rows, warps=tile.warps,
        )  # fmt: skip
    refuse_nan("path_sweep", 0 if int(found[1]) else -1)
    return x, bits, found[0]


def _adjoint(
    weight: Tensor, a: Tensor, bits: Tensor, g: Tensor, threshold: float, power: int,
    mask: Tensor | None, x: Tensor, found: Tensor, sweep: bool,
) -> None:  # fmt: skip
    rows, columns = weight.shape
    tile = config().adjoint
    lines_, across = blocks(rows, tile.rows), blocks(columns, tile.columns)
    # A function of the shape alone: path_backward and path_sweep cut a weight alike.
    steps = min(
        tile.steps, max(min(_SHORT, tile.steps), triton.next_power_of_2(lines_ * across // _ENOUGH))
    )
    chunks = blocks(lines_, steps)
    held = as_weight(weight, power)
    parts = x.new_empty(chunks * tile.rows, columns)
    launch(
        path_adjoint_kernel, (chunks, across), held, held,
        as_mask(mask, held), a, g, threshold, parts, bits, found, rows, columns,
        blocks(columns, 8), steps, POWER=power, MASKED=mask is not None, SWEEP=sweep,
        ROWS=tile.rows, COLUMNS=tile.columns, warps=tile.warps,
    )  # fmt: skip
    _add_rows(parts, x)


def _add_rows(parts: Tensor, out: Tensor) -> None:
    count, columns = parts.shape
    tile = config().flat
    launch(
        add_rows_kernel, (blocks(columns, tile.rows),), out, parts, out, count, columns,
        BLOCK=tile.rows, warps=tile.warps,
    )  # fmt: skip


def _floor32(value: float) -> float:
    """The largest float32 that is not above: float32 scores are above both or neither."""
    near = ctypes.c_float(value).value
    if near <= value:
        return near
    if math.isinf(near):
        return 3.4028234663852886e38
    word = ctypes.c_int32.from_buffer(ctypes.c_float(near))
    if near == 0.0:
        return -1.401298464324817e-45
    word.value += -1 if near > 0 else 1
    return ctypes.c_float.from_buffer(word).value
