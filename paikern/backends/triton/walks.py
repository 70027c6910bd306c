"""phew_walks: one lane a walk, those of a program hop together, one way (csrc/cpu/phew.h).

Hop h of walk t draws Philox4x32-10 of (t, h), so that no lane needs another and the bits of every
walk are those of the CPU. A lane between weights chooses a slot and a unit there; a lane before a
weight draws a block of kernels by the tables, a kernel by adding up those of the block in float64,
and an element by its share. Weights lie at addresses in a table; where
their types differ, copies of one type that holds all of them do.

Bytes moved, a weight of a walk: a few entries of a table, 4 to 16 kernels read twice, 8 written.
Limit: the latency of reads that follow from one another; programs are small, so that a batch of
a few hundred walks is spread over the device. Not yet measured on a GPU.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.draws import choose, key, philox
from paikern.backends.triton.phew import norm_of, share_of

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
_INPUT = tl.constexpr(0)
_WEIGHT = tl.constexpr(1)
_OUTPUT = tl.constexpr(3)


@triton.jit
def _norm(address, index, inside, TYPE: tl.constexpr, WEIGHTING: tl.constexpr):
    """|w| or w * w of an element of each lane's weight, 0 outside."""
    pointer = address.to(tl.pointer_type(TYPE)) + index
    return norm_of(tl.load(pointer, mask=inside, other=0.0), WEIGHTING)


@triton.jit
def _share(address, taps, kernel, most, inside, TYPE: tl.constexpr, WEIGHTING: tl.constexpr):
    """What each lane's kernel weighs; `most` taps at the most."""
    n = tl.zeros(kernel.shape, dtype=tl.float64)
    for tap in range(most):
        n += _norm(address, kernel * taps + tap, inside & (tap < taps), TYPE, WEIGHTING)
    return share_of(n, WEIGHTING)


@triton.jit
def _drawn(first, reached, count):
    """The first sum above the aim; where rounding leaves none, the first that reaches the last."""
    return tl.where(first < count, first, reached)


@triton.jit
def _met(index, place, inside):
    """Where the list of a unit begins, and how many units it holds."""
    begin = tl.load(index + place, mask=inside, other=0)
    return begin, (tl.load(index + place + 1, mask=inside, other=0) - begin).to(tl.int64)


@triton.jit
def _one_met(index, place, word, inside):
    """A unit of a list, and what is left of the word."""
    begin, count = _met(index, place, inside)
    chosen, word = choose(word, count)
    return tl.load(index + begin + chosen, mask=inside, other=0).to(tl.int64), word


@triton.jit
def _stand_on(nodes, owner, there, node, unit, inside):
    """The node and the number there of a unit, for the lanes inside."""
    node = tl.where(inside, tl.load(owner + there, mask=inside, other=0).to(tl.int64), node)
    return node, tl.where(inside, there - tl.load(nodes + 8 * node + 2), unit)


@triton.jit
def phew_walks_kernel(
    table,
    shares,
    nodes,
    slots,
    links,
    index,
    owner,
    begins,
    walks,
    node_count,
    inputs,
    low,
    high,
    start,
    count,
    width,
    FORWARDS: tl.constexpr,
    WEIGHTING: tl.constexpr,
    WHOLE: tl.constexpr,
    TYPE: tl.constexpr,
    LANES: tl.constexpr,
):
    """`count` walks start, start + 2, ... of one direction, in every other row of `walks`."""
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    walking = place < count
    number = start + 2 * place
    turn = number >> 1
    if FORWARDS:
        unit = tl.load(begins + turn % inputs, mask=walking, other=0).to(tl.int64)
        node = tl.load(owner + unit, mask=walking, other=0).to(tl.int64)
        unit -= tl.load(nodes + 8 * node + 2)
        target, first_way, ways_of = _OUTPUT, 4, links
    else:
        node = place * 0 + node_count - 1
        unit = turn % tl.load(nodes + 8 * node + 3)
        target, first_way, ways_of = _INPUT, 6, slots
    out = walks + place * 2 * width
    length, hop = place * 0, place * 0
    dead = place < 0
    walking &= tl.load(nodes + 8 * node) != target
    while tl.max(walking.to(tl.int32), 0) > 0:
        x, y, z, word = philox(number & 0xFFFFFFFF, number >> 32, hop, place * 0, low, high)
        hop += 1

        # From a unit to one that it meets: by the links of the node, or backwards by its slots.
        behind = walking & (tl.load(nodes + 8 * node) == _WEIGHT)
        if FORWARDS:
            behind = place < 0
        going = walking & (behind == 0)
        way = tl.load(nodes + 8 * node + first_way, mask=going, other=0)
        end = tl.load(nodes + 8 * node + first_way + 1, mask=going, other=0)
        ways = tl.max(end - way, 0)
        open_ = place * 0
        for step in range(ways):
            known = going & (way + step < end)
            list_ = tl.load(ways_of + 2 * (way + step) + 1, mask=known, other=0)
            _, met = _met(index, list_ + unit, known)
            open_ += (met > 0).to(tl.int64)
        dead |= going & (open_ == 0)
        going &= open_ > 0
        chosen, word_left = choose(word, open_)
        word = tl.where(going, word_left, word)
        taken, taken_list, passed = place * 0, place * 0, place * 0
        for step in range(ways):
            known = going & (way + step < end)
            list_ = tl.load(ways_of + 2 * (way + step) + 1, mask=known, other=0)
            _, met = _met(index, list_ + unit, known)
            own = (met > 0) & (passed == chosen)
            taken = tl.where(own, way + step, taken)
            taken_list = tl.where(own, list_, taken_list)
            passed += (met > 0).to(tl.int64)
        there, word_left = _one_met(index, taken_list + unit, word, going)
        word = tl.where(going, word_left, word)
        if FORWARDS:
            slot = tl.load(links + 2 * taken, mask=going, other=0)
            node = tl.where(going, tl.load(slots + 2 * slot, mask=going, other=0), node)
            unit = tl.where(going, there, unit)
        else:
            node, unit = _stand_on(nodes, owner, there, node, unit, going)

        # Through a weight: entered by a unit of one side, left by one of the other.
        through = behind
        if FORWARDS:
            through = going & (tl.load(nodes + 8 * node) == _WEIGHT)
        row = table + 9 * tl.load(nodes + 8 * node + 1, mask=through, other=0)
        address = tl.load(row, mask=through, other=0)
        cols = tl.load(row + 2, mask=through, other=1)
        taps = tl.load(row + 3, mask=through, other=1)
        rows = tl.load(row + 1, mask=through, other=1).to(tl.int32)
        rows //= tl.load(row + 4, mask=through, other=1).to(tl.int32)  # of a group
        along = (tl.load(row + 5, mask=through, other=0) != 0) == FORWARDS
        first_bit = tl.load(row + 6, mask=through, other=-1)
        # Blocks are of 1, 4 or 16 kernels: the logarithm of that.
        block = tl.where(along, 4, 2) - tl.where(taps >= 4, 2, 0)
        reach = tl.where(along, cols, rows)
        stride = tl.where(along, 1, cols)
        entries = (reach + (1 << block) - 1) >> block
        # Units have 32 bits, and so have their quotients: those of 64 are routines.
        group = unit.to(tl.int32) // tl.where(along, rows, cols.to(tl.int32))
        from_ = tl.where(along, unit * cols, group * (rows - 1) * cols + unit)
        entry = tl.load(row + tl.where(along, 7, 8), mask=through, other=0) + unit * entries
        u = ((x << 21) | (y >> 11)).to(tl.float64) * 1.1102230246251565e-16  # 2**-53
        lower, upper = place * 0, tl.where(through, entries, 0)
        while tl.max(upper - lower, 0) > 0:
            middle = (lower + upper) // 2
            searching = lower < upper
            value = tl.load(shares + entry + middle, mask=searching, other=0.0).to(tl.float64)
            above = value > u
            upper = tl.where(searching & above, middle, upper)
            lower = tl.where(searching & (above == 0), middle + 1, lower)
        found = through & (lower < entries)
        share = tl.load(shares + entry + lower, mask=found, other=1.0).to(tl.float64)
        before = tl.load(shares + entry + lower - 1, mask=found & (lower > 0), other=0.0)
        before = before.to(tl.float64)
        part = (u - before) / (share - before)
        begin = tl.where(found, lower << block, (u * reach.to(tl.float64)).to(tl.int64))
        size = tl.where(found, tl.minimum(1 << block, reach - begin), 1)
        size = tl.where(through, size, 0)
        from_ += begin * stride

        most, most_taps = tl.max(size, 0), tl.max(taps, 0)
        chosen = place * 0
        if most > 1:
            total = u * 0.0
            for j in range(most):
                known = j < size
                at = from_ + j * stride
                n = _share(address, taps, at, most_taps, known, TYPE, WEIGHTING)
                total += tl.where(known, n, 0.0)
            aim = part * total
            upto = u * 0.0
            reached = place * 0 - 1
            for j in range(most):
                known = j < size
                at = from_ + j * stride
                n = _share(address, taps, at, most_taps, known, TYPE, WEIGHTING)
                upto += tl.where(known, n, 0.0)
                chosen += (known & (upto <= aim)).to(tl.int64)
                reached = tl.where(known & (reached < 0) & ((upto < total) == 0), j, reached)
            chosen = tl.where(size > 1, _drawn(chosen, reached, size), 0)
        kernel = from_ + chosen * stride
        noted = through & (first_bit >= 0)
        if WHOLE:
            for tap in range(most_taps):
                own = noted & (tap < taps)
                tl.store(
                    out + length, first_bit + kernel * taps + tap, mask=own & (length < width)
                )  # fmt: skip
                length += own.to(tl.int64)
        else:
            tap = place * 0
            if most_taps > 1:
                drawing = through & (taps > 1)
                v = z.to(tl.float64) * 2.3283064365386963e-10  # 2**-32
                total = u * 0.0
                for t in range(most_taps):
                    known = drawing & (t < taps)
                    total += _norm(address, kernel * taps + t, known, TYPE, WEIGHTING)
                aim = v * total
                upto = u * 0.0
                reached = place * 0 - 1
                for t in range(most_taps):
                    known = drawing & (t < taps)
                    upto += _norm(address, kernel * taps + t, known, TYPE, WEIGHTING)
                    tap += (known & (upto <= aim)).to(tl.int64)
                    reached = tl.where(known & (reached < 0) & ((upto < total) == 0), t, reached)
                even = (v * taps.to(tl.float64)).to(tl.int64)
                tap = tl.where(total > 0, _drawn(tap, reached, taps), even)
                tap = tl.where(drawing, tap, 0)
            tl.store(
                out + length, first_bit + kernel * taps + tap, mask=noted & (length < width)
            )  # fmt: skip
            length += noted.to(tl.int64)
        other = group * tl.where(along, cols, rows) + begin + chosen
        unit = tl.where(through, other, unit)

        if not FORWARDS:  # from a weight to what it reads
            slot = tl.load(nodes + 8 * node + 6, mask=behind, other=0)
            list_ = tl.load(slots + 2 * slot + 1, mask=behind, other=0)
            _, met = _met(index, list_ + unit, behind)
            dead |= behind & (met == 0)
            behind &= met > 0
            there, word = _one_met(index, list_ + unit, word, behind)
            node, unit = _stand_on(nodes, owner, there, node, unit, behind)
        walking &= (dead == 0) & (tl.load(nodes + 8 * node) != target)
    if tl.max(dead.to(tl.int32), 0) > 0:  # what walks without a successor have passed
        tl.debug_barrier()
        for step in range(width):
            tl.store(out + step, place * 0 - 1, mask=dead)


def phew_walks(
    weights: Sequence[Tensor],
    tables: Tensor,
    geometry: Tensor,
    graph: Sequence[Tensor],
    seed: int,
    first: int,
    count: int,
    width: int,
    weighting: int,
    whole: bool,
) -> Tensor:
    kinds = {w.dtype for w in weights}
    kind = torch.float64 if torch.float64 in kinds else torch.float32
    if len(kinds) == 1:
        (kind,) = kinds
    held = [w.to(kind) for w in weights]
    addresses = torch.tensor([w.data_ptr() for w in held], dtype=torch.int64)
    rows = torch.cat([addresses.view(-1, 1).to(geometry.device), geometry], 1)
    nodes, slots, links, index, owner, starts = (t.contiguous() for t in graph)
    walks = geometry.new_full((count, width), -1)
    low, high = key(seed)
    lanes, warps = config().walk
    for forwards in (True, False):
        skipped = first % 2 if forwards else 1 - first % 2  # even walks go forwards
        number = (count - skipped + 1) // 2
        launch(
            phew_walks_kernel, (blocks(number, lanes),), geometry, rows, tables.contiguous(),
            nodes, slots, links, index, owner, starts, walks[skipped:], len(nodes), len(starts),
            low, high, first + skipped, number, width, FORWARDS=forwards, WEIGHTING=weighting,
            WHOLE=whole, TYPE=_TYPES[kind], LANES=lanes, warps=warps,
        )  # fmt: skip
    return walks
