"""phew_tables, phew_keep_.

phew_tables: `phew_sums_kernel` adds up the kernels of every block, one lane an entry; then
`phew_shares_kernel` cumulates those of a row or column, one lane each, and divides by the last. All
sums are float64 and go from the first element to the last, as on the CPU: the entries have the same
bits. Between the two the sums lie as [blocks, lists], so that lanes read neighbours. Bytes moved:
two reads of the weights, 28 an entry, of which there is one for 4 to 16 kernels. Limit: float64.

phew_keep_: one program, rounds of up to 1000 walks, one a lane: csrc/cuda/phew_keep.cuh says why
they are those of the CPU. `phew_repeats_kernel` marks bits that a walk has had before, where it can
matter. Bytes moved: the walks once or twice, and a word of the mask for each of their bits. Limit:
the latency of one program's reads all over the mask.

Not yet measured on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.tiles import widen
from paikern.backends.walk_blocks import column_block, row_block, table_blocks

KEEP_LANES = 1024  # at least a window of walks
WINDOW = tl.constexpr(1000)


@triton.jit
def wide(values):
    """float64, exactly."""
    if values.dtype == tl.float64:
        found = values
    else:
        found = widen(values).to(tl.float64)
    return found


@triton.jit
def norm_of(values, WEIGHTING: tl.constexpr):
    """|w| or w * w in float64."""
    found = wide(values)
    return found * found if WEIGHTING == 1 else tl.abs(found)


@triton.jit
def share_of(n, WEIGHTING: tl.constexpr):
    """What a kernel weighs: its n, or 1 / n."""
    if WEIGHTING == 2:
        n = tl.where(n > 0, 1.0 / tl.where(n > 0, n, 1.0), 0.0)
    return n


@triton.jit
def phew_sums_kernel(
    weight,
    sums,
    entries,
    cols,
    taps,
    group_rows,
    length,
    lists,
    BLOCK: tl.constexpr,
    DOWN: tl.constexpr,
    WEIGHTING: tl.constexpr,
    LANES: tl.constexpr,
):
    """sums[block, list]; a list is a row or, DOWN, a column of a group of `group_rows`."""
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = entry < entries
    block = entry // lists
    line = entry - block * lists
    start = block * BLOCK
    if DOWN:
        first, stride = (line // cols * group_rows + start) * cols + line % cols, cols
    else:
        first, stride = line * cols + start, 1
    total = tl.zeros([LANES], dtype=tl.float64)
    for j in range(BLOCK):
        known = inside & (start + j < length)
        at = (first + j * stride) * taps
        n = tl.zeros([LANES], dtype=tl.float64)
        for tap in range(taps):
            n += norm_of(tl.load(weight + at + tap, mask=known, other=0.0), WEIGHTING)
        total += tl.where(known, share_of(n, WEIGHTING), 0.0)
    tl.store(sums + entry, total, mask=inside)


@triton.jit
def phew_shares_kernel(sums, tables, lists, count, LANES: tl.constexpr):
    """tables[list, block] from sums[block, list], which end up cumulated; `count` blocks."""
    line = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = line < lists
    total = tl.zeros([LANES], dtype=tl.float64)
    at = line
    for _ in range(count):
        total += tl.load(sums + at, mask=inside, other=0.0)
        tl.store(sums + at, total, mask=inside)
        at += lists
    tl.debug_barrier()
    at = line
    for block in range(count):
        upto = tl.load(sums + at, mask=inside, other=0.0)
        share = tl.where(total > 0, upto / tl.where(total > 0, total, 1.0), 0.0)
        tl.store(tables + line * count + block, share.to(tl.float32), mask=inside)
        at += lists


@triton.jit
def phew_repeats_kernel(walks, state, repeats, count, width, target, LANES: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    entries = tl.load(state) * 0 + count
    entries *= width
    if tl.load(state) + entries > target:  # else all fit, whatever they hold
        inside = entry < entries
        walk = entry // width * width
        own = tl.load(walks + entry, mask=inside, other=-1)
        again = entry < 0
        for place in range(width):
            earlier = inside & (walk + place < entry)
            again |= earlier & (tl.load(walks + walk + place, mask=earlier, other=-1) == own)
        tl.store(repeats + entry, again.to(tl.uint8), mask=inside)


@triton.jit
def phew_keep_kernel(
    words,
    state,
    walks,
    repeats,
    count,
    width,
    target,
    stall,
    EXACT: tl.constexpr,
    LANES: tl.constexpr,
):
    lane = tl.arange(0, LANES).to(tl.int64)
    kept, walked = tl.load(state), tl.load(state + 1)
    window_new, window_skipped = tl.load(state + 2), tl.load(state + 3)
    all_skipped, status = tl.load(state + 4), tl.load(state + 5)
    status = tl.where(kept >= target, kept * 0 + 1, status)
    at = kept * 0
    while (at < count) & (status == 0):
        missing = target - kept
        size = tl.minimum(WINDOW - walked % WINDOW, count - at)
        here = lane < size
        walk = (at + lane) * width
        first, end, skipped = size * 0, size, size * 0
        if missing < size * width:
            fresh = lane * 0
            for place in range(width):
                bit = tl.load(walks + walk + place, mask=here, other=-1)
                taken = tl.load(words + (bit >> 5), mask=bit >= 0, other=-1)
                again = tl.load(repeats + walk + place, mask=here, other=1)
                open_ = ((taken >> (bit & 31).to(tl.int32)) & 1) == 0
                fresh += (open_ & (again == 0) & (bit >= 0)).to(tl.int64)
            begins = fresh > 0
            if EXACT:
                begins &= fresh <= missing
            first = tl.min(tl.where(begins, lane, size), 0)
            skipped = tl.sum(((lane < first) & (fresh > missing)).to(tl.int64), 0)
            counted = tl.where(lane < first, 0, fresh)
            upto = tl.cumsum(counted, 0)
            over = (upto > missing) | (upto - counted >= missing)
            end = tl.min(tl.where((lane > first) & here & over, lane, size), 0)
        tl.debug_barrier()  # all have read the bits
        gained = lane * 0
        mine = (lane >= first) & (lane < end)
        for place in range(width):
            bit = tl.load(walks + walk + place, mask=mine, other=-1)
            flag = tl.full([LANES], 1, tl.int32) << (bit & 31).to(tl.int32)
            held = tl.atomic_or(words + (bit >> 5), flag, mask=bit >= 0)
            gained += ((bit >= 0) & ((held & flag) == 0)).to(tl.int64)
        tl.debug_barrier()  # all have set them
        found = tl.sum(gained, 0)
        kept += found
        window_new += found
        walked += end
        all_skipped += skipped
        window_skipped += skipped
        at += end
        if kept >= target:
            status = status * 0 + 1
        elif walked % WINDOW == 0:
            if window_new < stall:
                status = tl.where(window_skipped > 0, status * 0 + 3, status * 0 + 2)
            window_new *= 0
            window_skipped *= 0
    tl.store(state, kept)
    tl.store(state + 1, walked)
    tl.store(state + 2, window_new)
    tl.store(state + 3, window_skipped)
    tl.store(state + 4, all_skipped)
    tl.store(state + 5, status)


def phew_tables(weights: Sequence[Tensor], geometry: Tensor, size: int, weighting: int) -> Tensor:
    tables = geometry.new_empty(size, dtype=torch.float32)
    lanes, warps = 8 * config().pattern.rows, config().pattern.warps
    for weight, numbers in zip(weights, geometry.tolist(), strict=True):
        rows, cols, taps, groups, _, _, by_row, by_col = numbers
        across, down = table_blocks(rows, cols, taps, groups)
        high, held = rows // groups, weight.detach()
        for column, lists, count, block, begin in (
            (False, rows, across, row_block(taps), by_row),
            (True, groups * cols, down, column_block(taps), by_col),
        ):
            entries = lists * count
            sums = held.new_empty(entries, dtype=torch.float64)
            launch(
                phew_sums_kernel, (blocks(entries, lanes),), held, held, sums, entries, cols, taps,
                high, high if column else cols, lists, BLOCK=block, DOWN=column,
                WEIGHTING=weighting, LANES=lanes, warps=warps,
            )  # fmt: skip
            launch(
                phew_shares_kernel, (blocks(lists, lanes),), held, sums,
                tables[begin : begin + entries], lists, count, LANES=lanes, warps=warps,
            )  # fmt: skip
    return tables


def phew_keep_(
    bits: Tensor, state: Tensor, walks: Tensor, target: int, stall: int, exact: bool
) -> None:
    held = walks.contiguous()
    count, width = held.shape
    aligned = bits.numel() % 4 == 0 and bits.data_ptr() % 4 == 0
    words = bits
    if not aligned:  # bits are set in words of 32
        words = bits.new_zeros((bits.numel() + 3) // 4 * 4)
        words[: bits.numel()] = bits
    repeats = bits.new_empty(held.shape)
    lanes, warps = 8 * config().pattern.rows, config().pattern.warps
    launch(
        phew_repeats_kernel, (blocks(held.numel(), lanes),), bits, held, state, repeats, count,
        width, target, LANES=lanes, warps=warps,
    )  # fmt: skip
    launch(
        phew_keep_kernel, (1,), bits, words.view(torch.int32), state, held, repeats, count, width,
        target, stall, EXACT=exact, LANES=KEEP_LANES, warps=8,
    )  # fmt: skip
    if not aligned:
        bits.copy_(words[: bits.numel()])
