"""balanced_mask: the steps of csrc/cpu/balanced_mask.cpp, each over all that is independent.

`starts`: prefix sums of rows[i] % outputs, the weights of row i that do not go round all columns;
a program a group. `laps`: random permutations of the columns, Fisher and Yates with Philox draws; a
lane a lap. `deal`: a row that ends one lap and begins the next may have no column twice: the m-th
entry at the beginning of the new lap that it already has is exchanged for the m-th one behind that
it has not. A lap must be final before the next is looked at: a program a group. Rows behind the
last lap take the first columns of one more permutation that they do not have. `mark`: extra[kernel]
= 1 where a row has an entry; a program a row. `draw`: the positions in a kernel, Floyd's subsets
from Philox in a tile [kernels, positions]; or `rank`: those of the largest magnitudes.

Only integers but for magnitudes, which are compared: the bits are those of the CPU. Bytes moved: 4
an entry written and shuffled in place, 1 a kernel, the scores, a byte a weight that is packed into
bits. Limits: the latency of a lap's exchanges, which follow from one another, and that of laps in
`deal`; in a kernel positions are compared with each other. Not yet measured on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.errors import refuse_nan
from paikern.backends.triton.bits import pack_mask
from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.draws import choose, key, philox
from paikern.backends.triton.tiles import widen

_FAVOURITES = tl.constexpr(0xFFFFFFFF)  # the number of the lap that is not dealt


@triton.jit
def balanced_starts_kernel(kept, starts, laps, inputs, outputs, cover, LANES: tl.constexpr):
    """starts [groups, inputs + 1] and laps [groups]; cover -1: as many laps as it takes."""
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    kept += group * inputs
    starts += group * (inputs + 1)
    dealt, covered = group * 0, group * 0
    for begin in range(0, inputs, LANES):
        inside = begin + lane < inputs
        row = tl.load(kept + begin + lane, mask=inside, other=0)
        round_ = row // outputs
        upto = tl.cumsum(row - round_ * outputs, 0)
        tl.store(starts + 1 + begin + lane, dealt + upto, mask=inside)
        dealt += tl.sum(row - round_ * outputs, 0)
        covered += tl.sum(round_, 0)
    tl.store(starts, group * 0)
    count = (dealt + outputs - 1) // outputs
    room = tl.maximum(cover - covered, 0)
    tl.store(laps + group, tl.where(cover >= 0, tl.minimum(count, room), count))


@triton.jit
def balanced_laps_kernel(
    starts,
    laps,
    order,
    favourites,
    groups,
    inputs,
    outputs,
    low,
    high,
    tag,
    LANES: tl.constexpr,
):
    """A lane for each of inputs + 1 laps of every group, the last one that of the favourites."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    group = lane // (inputs + 1)
    lap = lane - group * (inputs + 1)
    inside, last = group < groups, lap == inputs
    dealt = tl.load(laps + group, mask=inside, other=0)
    total = tl.load(starts + group * (inputs + 1) + inputs, mask=inside, other=0)
    inside &= tl.where(last, total > dealt * outputs, lap < dealt)
    if tl.max(inside.to(tl.int32), 0) > 0:
        own = tl.where(
            last,
            (favourites + group * outputs).to(tl.int64),
            (order + (group * inputs + lap) * outputs).to(tl.int64),
        ).to(tl.pointer_type(tl.int32))
        for k in range(outputs):
            tl.store(own + k, k + tl.zeros([LANES], tl.int32), mask=inside)
        number = tl.where(last, _FAVOURITES, lap)
        for four in range(tl.cdiv(outputs - 1, 4)):
            drawn = philox(number, group, number * 0 + four, number * 0 + tag, low, high)
            for i in tl.static_range(4):
                at = outputs - 1 - (4 * four + i)
                if at > 0:
                    other, _ = choose(drawn[i], number * 0 + at + 1)
                    tl.debug_barrier()
                    one = tl.load(own + at, mask=inside, other=0)
                    two = tl.load(own + other, mask=inside, other=0)
                    tl.debug_barrier()
                    tl.store(own + at, two, mask=inside)
                    tl.store(own + other, one, mask=inside & (other < at))


@triton.jit
def _row_at(starts, inputs, at):
    """The first row that ends behind `at`."""
    low, high = at * 0, at * 0 + inputs
    while low < high:
        middle = (low + high) // 2
        behind = tl.load(starts + middle + 1) > at
        high = tl.where(behind, middle, high)
        low = tl.where(behind, low, middle + 1)
    return low


@triton.jit
def balanced_deal_kernel(
    starts,
    laps,
    order,
    favourites,
    seen,
    places,
    inputs,
    outputs,
    LANES: tl.constexpr,
):
    """seen [groups, outputs] begins with -1; places [groups, 2, outputs] is room."""
    group = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES).to(tl.int64)
    starts += group * (inputs + 1)
    order += group * inputs * outputs
    favourites += group * outputs
    seen += group * outputs
    twice_at = places + 2 * group * outputs
    free_at = twice_at + outputs
    total, dealt = tl.load(starts + inputs), tl.load(laps + group) * outputs
    border = group * 0 + outputs
    while (border <= dealt) & (border < total):
        row = _row_at(starts, inputs, border)
        begin, end = tl.load(starts + row), tl.load(starts + row + 1)
        if begin < border:
            at = begin
            while at < border:
                held = at + lane < border
                column = tl.load(order + at + lane, mask=held, other=0)
                tl.store(seen + column, row.to(tl.int32) + tl.zeros([LANES], tl.int32), mask=held)
                at += LANES
            tl.debug_barrier()
            if border < dealt:
                wanted = border * 0
                at = border
                while at < end:
                    held = at + lane < end
                    column = tl.load(order + at + lane, mask=held, other=0)
                    twice = held & (tl.load(seen + column, mask=held, other=-1) == row)
                    turn = wanted + tl.cumsum(twice.to(tl.int64), 0) - 1
                    tl.store(twice_at + turn, (at + lane - border).to(tl.int32), mask=twice)
                    wanted += tl.sum(twice.to(tl.int64), 0)
                    at += LANES
                given = border * 0
                at = end
                while given < wanted:
                    held = at + lane < border + outputs
                    column = tl.load(order + at + lane, mask=held, other=0)
                    free = held & (tl.load(seen + column, mask=held, other=-1) != row)
                    turn = given + tl.cumsum(free.to(tl.int64), 0) - 1
                    first = free & (turn < wanted)
                    tl.store(free_at + turn, (at + lane - border).to(tl.int32), mask=first)
                    given += tl.sum(free.to(tl.int64), 0)
                    at += LANES
                tl.debug_barrier()
                at = border * 0
                while at < wanted:
                    held = at + lane < wanted
                    one = border + tl.load(twice_at + at + lane, mask=held, other=0)
                    two = border + tl.load(free_at + at + lane, mask=held, other=0)
                    column = tl.load(order + one, mask=held, other=0)
                    other = tl.load(order + two, mask=held, other=0)
                    tl.store(order + one, other, mask=held)
                    tl.store(order + two, column, mask=held)
                    at += LANES
            else:
                given = border
                at = border * 0
                while given < end:
                    held = at + lane < outputs
                    column = tl.load(favourites + at + lane, mask=held, other=0)
                    free = held & (tl.load(seen + column, mask=held, other=-1) != row)
                    place = given + tl.cumsum(free.to(tl.int64), 0) - 1
                    tl.store(order + place, column, mask=free & (place < end))
                    given += tl.sum(free.to(tl.int64), 0)
                    at += LANES
            tl.debug_barrier()
        border += outputs


@triton.jit
def balanced_mark_kernel(
    starts,
    laps,
    order,
    favourites,
    extra,
    inputs,
    outputs,
    TRANSPOSED: tl.constexpr,
    LANES: tl.constexpr,
):
    """A program a row; rows that begin behind the last lap have favourites alone."""
    row = tl.program_id(0).to(tl.int64)
    group = row // inputs
    number = row - group * inputs
    starts += group * (inputs + 1)
    begin, end = tl.load(starts + number), tl.load(starts + number + 1)
    first = order + group * inputs * outputs + begin
    if begin >= tl.load(laps + group) * outputs:
        first = favourites + group * outputs
    extra += group * inputs * outputs
    at = begin * 0
    while at < end - begin:
        place = at + tl.arange(0, LANES)
        inside = place < end - begin
        column = tl.load(first + place, mask=inside, other=0).to(tl.int64)
        kernel = number * outputs + column if TRANSPOSED else column * inputs + number
        tl.store(extra + kernel, tl.full([LANES], 1, tl.uint8), mask=inside)
        at += LANES


@triton.jit
def _count(kept, extra, kernel, inside, inputs, outputs, TRANSPOSED: tl.constexpr):
    """Weights of a kernel; `kept` holds those of every row."""
    if TRANSPOSED:
        row = kernel // outputs
    else:
        line = kernel // inputs
        row = line // outputs * inputs + (kernel - line * inputs)
    count = tl.load(kept + row, mask=inside, other=0) // outputs
    return count + tl.load(extra + kernel, mask=inside, other=0).to(tl.int64)


@triton.jit
def balanced_draw_kernel(
    kept,
    extra,
    mask,
    kernels,
    inputs,
    outputs,
    positions,
    low,
    high,
    tag,
    TRANSPOSED: tl.constexpr,
    KERNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """mask [kernels, positions] bytes: the j-th draw is below j + 1, j stands in for one taken."""
    kernel = tl.program_id(0).to(tl.int64) * KERNELS + tl.arange(0, KERNELS)
    inside = kernel < kernels
    place = tl.arange(0, POSITIONS)[None, :].to(tl.int64)
    count = _count(kept, extra, kernel, inside, inputs, outputs, TRANSPOSED)
    full = count == positions
    taken = tl.broadcast_to(full[:, None].to(tl.int32), [KERNELS, POSITIONS])
    most = tl.max(tl.where(full, 0, count), 0)
    for four in range(tl.cdiv(most, 4)):
        drawn = philox(
            kernel & 0xFFFFFFFF, kernel >> 32, kernel * 0 + four, kernel * 0 + tag, low, high
        )
        for i in tl.static_range(4):
            number = 4 * four + i
            last = positions - count + number
            other, _ = choose(drawn[i], last + 1)
            met = tl.max(tl.where(place == other[:, None], taken, 0), 1) > 0
            found = tl.where(met, last, other)
            own = (number < count) & (full == 0)
            taken = tl.where(own[:, None] & (place == found[:, None]), 1, taken)
    at = mask + kernel[:, None] * positions + place
    tl.store(at, taken.to(tl.uint8), mask=inside[:, None] & (place < positions))


@triton.jit
def _magnitude(scores, index, inside):
    values = tl.load(scores + index, mask=inside, other=0.0)
    if values.dtype != tl.float64:
        values = widen(values)
    return tl.abs(values)


@triton.jit
def balanced_rank_kernel(
    scores,
    kept,
    extra,
    mask,
    nan,
    kernels,
    inputs,
    outputs,
    positions,
    TRANSPOSED: tl.constexpr,
    KERNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """mask [kernels, positions] bytes: the largest magnitudes, the lower position on ties."""
    kernel = tl.program_id(0).to(tl.int64) * KERNELS + tl.arange(0, KERNELS)
    inside = kernel < kernels
    place = tl.arange(0, POSITIONS)[None, :]
    index = kernel[:, None] * positions + place
    here = inside[:, None] & (place < positions)
    count = _count(kept, extra, kernel, inside, inputs, outputs, TRANSPOSED)
    own = _magnitude(scores, index, here)
    before = tl.zeros([KERNELS, POSITIONS], tl.int32)
    for j in range(positions):
        other = _magnitude(scores, kernel * positions + j, inside)[:, None]
        before += ((other > own) | ((other == own) & (j < place))).to(tl.int32)
    tl.store(mask + index, (before < count[:, None]).to(tl.uint8), mask=here)
    if tl.max(tl.max((here & (own != own)).to(tl.int32), 1), 0) > 0:
        tl.store(nan, 1)


def balanced_mask(
    rows: Tensor,
    scores: Tensor,
    grid: Sequence[int],
    transposed: bool,
    cover: int,
    seed: int,
    stream: int,
) -> Tensor:
    groups, inputs, outputs, positions = grid
    kernels, count = groups * inputs * outputs, math.prod(grid)
    given = rows.contiguous()
    mask = given.new_empty(count, dtype=torch.uint8)
    if count == 0:
        return mask

    def words(number: int, fill: int | None = None) -> Tensor:
        if fill is None:
            return given.new_empty(number, dtype=torch.int32)
        return given.new_full((number,), fill, dtype=torch.int32)

    starts, laps = given.new_empty(groups * (inputs + 1)), given.new_empty(groups)
    order, favourites = words(kernels), words(groups * outputs)
    seen, places = words(groups * outputs, -1), words(2 * groups * outputs)
    extra = given.new_zeros(kernels, dtype=torch.uint8)
    low, high = key(seed)
    flat, walk = config().flat, config().walk
    launch(
        balanced_starts_kernel, (groups,), given, given, starts, laps, inputs, outputs, cover,
        LANES=flat.rows, warps=flat.warps,
    )  # fmt: skip
    launch(
        balanced_laps_kernel, (blocks(groups * (inputs + 1), walk.lanes),), given, starts, laps,
        order, favourites, groups, inputs, outputs, low, high, 2 * stream, LANES=walk.lanes,
        warps=walk.warps,
    )  # fmt: skip
    launch(
        balanced_deal_kernel, (groups,), given, starts, laps, order, favourites, seen, places,
        inputs, outputs, LANES=flat.rows, warps=flat.warps,
    )  # fmt: skip
    launch(
        balanced_mark_kernel, (groups * inputs,), given, starts, laps, order, favourites, extra,
        inputs, outputs, TRANSPOSED=transposed, LANES=flat.rows, warps=flat.warps,
    )  # fmt: skip
    wide = triton.next_power_of_2(positions)
    tile, warps = config().pattern
    beside = max(1, 4 * tile // wide)
    same = {
        "TRANSPOSED": transposed, "KERNELS": beside, "POSITIONS": wide,
        "warps": max(warps, wide // 256),
    }  # fmt: skip
    on = (blocks(kernels, beside),)
    if scores.numel():
        values, nan = scores.detach().contiguous(), words(1, 0)
        launch(
            balanced_rank_kernel, on, given, values, given, extra, mask, nan, kernels, inputs,
            outputs, positions, **same,
        )  # fmt: skip
        refuse_nan("balanced_mask", 0 if int(nan) else -1)
    else:
        launch(
            balanced_draw_kernel, on, given, given, extra, mask, kernels, inputs, outputs,
            positions, low, high, 2 * stream + 1, **same,
        )  # fmt: skip
    return pack_mask(mask)
