"""nm_mask, block_means, expand_blocks and the factored forms.

nm_mask: every weight counts, among the m of its group, the scores before it: those that are larger
or equal with a lower index. It is kept if they are fewer than n (ceil(r * n / m) in a rest of r).
Bytes moved: b a weight and 1/8 written; the m reads of a weight's neighbours come from the cache.
Limit: memory bandwidth for small m, m comparisons a weight for large ones.

block_means: float64, lane j of eight adds the elements j modulo 8 of each row of the block, row
after row, then the lanes are added in order: one program has several blocks, [blocks, 8] sums.
Bytes moved: b a weight. Limit: bandwidth, and for few large blocks the length of the sums.

expand_blocks: a bit a block -> a bit a weight, numel / 8 bytes written.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.blocks import blocks_of, matrix_of
from paikern.backends.errors import refuse_nan
from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.sweeps import as_float, as_mask
from paikern.backends.triton.tiles import bit_at, factored, lines, packed, widen


@triton.jit
def score_at(
    scores,
    a,
    g,
    mask,
    index,
    columns,
    inside,
    POWER: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    FACTORED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores at row-major positions; -1 for what the mask of a factored score excludes."""
    values = tl.load(scores + index, mask=inside, other=0.0)
    if values.dtype != tl.float32:
        values = widen(values)
    if FACTORED:
        line = index // columns
        x = tl.load(a + (index - line * columns), mask=inside, other=0.0)
        values = factored(values, x, tl.load(g + line, mask=inside, other=0.0), POWER)
        if MASKED:
            values = tl.where(bit_at(mask, index, inside), values, -1.0)
    if ABSOLUTE:
        values = tl.abs(values)
    return values


@triton.jit
def nm_mask_kernel(
    scores,
    a,
    g,
    mask,
    bits,
    nan,
    numel,
    columns,
    along,
    inner,
    n,
    m,
    POWER: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    FACTORED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scores [outer, along, inner], groups run along the middle."""
    start = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    index, byte = start + lines(ROWS), tl.arange(0, ROWS)
    inside = index < numel
    own = score_at(
        scores, a, g, mask, index, columns, inside, POWER, ABSOLUTE, FACTORED, MASKED
    )  # fmt: skip
    place = index // inner % along
    first = place // m * m
    width = tl.minimum(along - first, m)
    keep = (width * n + m - 1) // m
    at = index - (place - first) * inner
    before = tl.zeros([ROWS, 8], dtype=tl.int32)
    for other in range(m):
        known = inside & (other < width)
        score = score_at(
            scores, a, g, mask, at, columns, known, POWER, ABSOLUTE, FACTORED, MASKED
        )  # fmt: skip
        earlier = (score == own) & (first + other < place)
        before += (known & ((score > own) | earlier)).to(tl.int32)
        at += inner
    tl.store(
        bits + start // 8 + byte, packed(inside & (before < keep)), mask=byte * 8 < numel - start
    )
    if tl.max(tl.max((inside & (own != own)).to(tl.int32), 1), 0) > 0:
        tl.store(nan, 1)


@triton.jit
def block_means_kernel(
    scores,
    a,
    g,
    mask,
    out,
    rows,
    columns,
    high,
    wide,
    across,
    count,
    POWER: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    FACTORED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[block], `across` blocks beside each other, `count` of them."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    top, left = block // across * high, block % across * wide
    height = tl.minimum(rows - top, high)
    width = tl.minimum(columns - left, wide)
    lane = tl.arange(0, 8)
    lanes = tl.zeros([BLOCKS, 8], dtype=tl.float64)
    for row in range(high):
        for step in range(tl.cdiv(wide, 8)):
            column = step * 8 + lane
            inside = ((block < count) & (row < height))[:, None] & (
                column[None, :] < width[:, None]
            )
            index = ((top + row) * columns + left)[:, None] + column[None, :]
            value = score_at(
                scores, a, g, mask, index, columns, inside, POWER, ABSOLUTE, FACTORED, MASKED
            )
            lanes += tl.where(inside, value.to(tl.float64), 0.0)
    total = tl.zeros([BLOCKS], dtype=tl.float64)
    for index in tl.static_range(8):
        total += tl.sum(tl.where((lane == index)[None, :], lanes, 0.0), 1)
    held = tl.maximum(height * width, 1).to(tl.float64)
    tl.store(out + block, total / held, mask=block < count)


@triton.jit
def expand_blocks_kernel(mask, bits, numel, columns, high, wide, across, ROWS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    index, byte = start + lines(ROWS), tl.arange(0, ROWS)
    inside = index < numel
    row = index // columns
    block = row // high * across + (index - row * columns) // wide
    kept = inside & bit_at(mask, block, inside)
    tl.store(bits + start // 8 + byte, packed(kept), mask=byte * 8 < numel - start)


def nm_mask(
    scores: Sequence[Tensor], n: int, m: int, dims: Sequence[int], absolute: bool
) -> list[Tensor]:
    held = [s.detach().contiguous() for s in scores]
    factors: list[tuple[Tensor, Tensor, Tensor | None]] = [(s, s, None) for s in held]
    return _nm("nm_mask", held, factors, n, m, dims, 1, absolute, False)


def nm_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    n: int,
    m: int,
    dims: Sequence[int],
    power: int,
) -> list[Tensor]:
    held = [w.detach().contiguous() for w in weights]
    factors = [
        (as_float(x), as_float(y), mask.contiguous() if mask.numel() else None)
        for x, y, mask in zip(a, g, masks, strict=True)
    ]
    return _nm("nm_mask_factored", held, factors, n, m, dims, power, False, True)


def _nm(
    operation: str,
    tensors: Sequence[Tensor],
    factors: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    n: int,
    m: int,
    dims: Sequence[int],
    power: int,
    absolute: bool,
    factored: bool,
) -> list[Tensor]:
    rows, warps = config().pattern
    nan = torch.zeros(len(tensors), dtype=torch.int32, device=tensors[0].device)
    made = []
    for index, (t, (a, g, mask), dim) in enumerate(zip(tensors, factors, dims, strict=True)):
        bits = t.new_empty((t.numel() + 7) // 8, dtype=torch.uint8)
        launch(
            nm_mask_kernel, (blocks(t.numel(), 8 * rows),), t, t, a, g, as_mask(mask, bits), bits,
            nan[index:], t.numel(), t.shape[-1], t.shape[dim], math.prod(t.shape[dim + 1 :]), n, m,
            POWER=power, ABSOLUTE=absolute, FACTORED=factored, MASKED=mask is not None, ROWS=rows,
            warps=warps,
        )  # fmt: skip
        made.append(bits)
    found = nan.tolist()
    refuse_nan(operation, found.index(1) if 1 in found else -1)
    return made


def block_means(scores: Tensor, block: Sequence[int], absolute: bool) -> Tensor:
    held = scores.detach().contiguous()
    return _means("block_means", held, held, held, None, block, 1, absolute, False)


def block_means_factored(
    weight: Tensor, a: Tensor, g: Tensor, mask: Tensor, block: Sequence[int], power: int
) -> Tensor:
    candidates = mask.contiguous() if mask.numel() else None
    held = weight.detach().contiguous()
    return _means(
        "block_means_factored",
        held,
        as_float(a),
        as_float(g),
        candidates,
        block,
        power,
        False,
        True,
    )


def _means(
    operation: str,
    held: Tensor,
    a: Tensor,
    g: Tensor,
    mask: Tensor | None,
    block: Sequence[int],
    power: int,
    absolute: bool,
    factored: bool,
) -> Tensor:
    rows, columns = matrix_of(held.shape)
    down, across = blocks_of(held.shape, block)
    means = held.new_empty((down, across), dtype=torch.float64)
    tile, warps = config().pattern
    launch(
        block_means_kernel, (blocks(down * across, tile),), held, held, a, g, as_mask(mask, held),
        means, rows, columns, block[0], block[1], across, down * across, POWER=power,
        ABSOLUTE=absolute, FACTORED=factored, MASKED=mask is not None, BLOCKS=tile, warps=warps,
    )  # fmt: skip
    refuse_nan(operation, 0 if bool(torch.isnan(means).any()) else -1)
    return means


def expand_blocks(packed: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    rows, columns = matrix_of(shape)
    across, numel = blocks_of(shape, block)[1], rows * columns
    held = packed.contiguous()
    bits = held.new_empty((numel + 7) // 8)
    tile, warps = config().pattern
    launch(
        expand_blocks_kernel, (blocks(numel, 8 * tile),), held, held, bits, numel, columns,
        block[0], block[1], across, ROWS=tile, warps=warps,
    )  # fmt: skip
    return bits
