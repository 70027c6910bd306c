"""The kernels of exact selection over many tensors: histograms, thresholds, bits.

    digit histogram -> threshold digit -> ... -> last digit, ties counted a chunk -> bits

Scores are read through a table in device memory, so that one launch serves every tensor: dense
[n] in three types, factored ((|w|**p) * a[i]) * g[o], or products |w * g|. A score becomes an
unsigned key of the same order (32 bits, or up to 46 where tensors have exponents); each pass adds
one digit of up to 11 bits to the threshold. Counts are integers: their order does not matter.
Thresholds and ranks stay in device memory, and no pass waits for the host.

Bytes moved for N scores of b bytes: (digits + 1) * N * b + N / 8, with three digits, two where all
scores are 16-bit; once more for 2**10 (2**11) counts a chunk of 131,072. Limit: memory bandwidth,
and the shared memory of the histograms.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from paikern.backends.triton.tiles import factored, lines, packed, read_any, unpacked

# Columns of the table.
DATA = tl.constexpr(0)
OTHER = tl.constexpr(1)  # a, or the gradient
RIGHT = tl.constexpr(2)  # g
CANDIDATES = tl.constexpr(3)
BITS = tl.constexpr(4)
NUMEL = tl.constexpr(5)
COLUMNS = tl.constexpr(6)  # 0: dense
RANKING = tl.constexpr(7)
CODE = tl.constexpr(8)
OTHER_CODE = tl.constexpr(9)
EXPONENT = tl.constexpr(10)
FIRST_CHUNK = tl.constexpr(11)
FIELDS = tl.constexpr(12)

DENSE = tl.constexpr(0)
FACTORED = tl.constexpr(1)
PRODUCT = tl.constexpr(2)


@triton.jit
def find_layer(table, chunk, layers, LAYERS: tl.constexpr):
    """The tensor that a chunk lies in: the last whose first chunk is not behind it."""
    index = tl.arange(0, LAYERS)
    first = tl.load(table + index * FIELDS + FIRST_CHUNK, mask=index < layers, other=2**62)
    return tl.sum((first <= chunk).to(tl.int32), 0) - 1


@triton.jit
def score_tile(
    row,
    start,
    left,
    MODE: tl.constexpr,
    POWER: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scores [ROWS, 8] of a tensor from `start`, -infinity for what its candidates exclude."""
    local = lines(ROWS)
    full = left >= 8 * ROWS
    scores = read_any(tl.load(row + DATA), tl.load(row + CODE), start, local, left, full)
    if MODE == PRODUCT:
        code = tl.load(row + OTHER_CODE)
        scores = tl.abs(scores * read_any(tl.load(row + OTHER), code, start, local, left, full))
    if MODE == FACTORED:
        columns = tl.load(row + COLUMNS)
        if columns > 0:
            a = tl.load(row + OTHER).to(tl.pointer_type(tl.float32))
            g = tl.load(row + RIGHT).to(tl.pointer_type(tl.float32))
            # One long division a tile, short ones an element.
            line = start // columns
            ahead = (start - line * columns).to(tl.int32) + local
            width = columns.to(tl.int32)
            down = ahead // width
            inside = local < left
            x = tl.load(a + (ahead - down * width), mask=inside, other=0.0)
            y = tl.load(g + line + down, mask=inside, other=0.0)
            scores = factored(scores, x, y, POWER)
    if ABSOLUTE:
        scores = tl.abs(scores)
    candidates = tl.load(row + CANDIDATES)
    if candidates != 0:
        kept = unpacked(candidates.to(tl.pointer_type(tl.uint8)), start, left, ROWS)
        scores = tl.where(kept, scores, float("-inf"))
    return scores


@triton.jit
def ordered_key(scores):
    """uint32 of the order of floats, -0 equal to +0."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -(2**31), 0, bits)
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True)


@triton.jit
def scaled_key(scores, exponent, infinity):
    """int64 >= 0 of the order of score * 2**exponent: `infinity` plus or minus a rank below it.

    The power of two is added to the exponent bits, which is exact once subnormals are normalised:
    the float of their integer mantissa has that exponent.
    """
    bits = scores.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    as_float = size.to(tl.float32).to(tl.int32, bitcast=True)
    normal = as_float - (127 + 22) * 2**23
    rank = tl.where(size < 2**23, normal.to(tl.int64), size.to(tl.int64))
    rank += (exponent + 23) * 2**23 + 1
    rank = tl.where(size == 0x7F800000, infinity, rank)
    rank = tl.where(size == 0, 0, rank)
    return infinity + tl.where(bits < 0, -rank, rank)


@triton.jit
def make_key(scores, row, infinity, SCALED: tl.constexpr):
    if SCALED:
        key = scaled_key(scores, tl.load(row + EXPONENT), infinity)
    else:
        key = ordered_key(scores)
    return key


@triton.jit
def histogram_kernel(
    table,
    layers,
    state,
    counts,
    parts,
    nan,
    infinity,
    LAYERS: tl.constexpr,
    MODE: tl.constexpr,
    POWER: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFT: tl.constexpr,
    DIGIT: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Counts of the next digit among the scores that agree with the threshold so far.

    state: [rankings, 2] threshold prefix and how many of its scores are still to be kept.
    counts: [rankings, 2**11] added to. parts: [chunks, 2**DIGIT], this chunk's, in the last pass.
    nan: [layers], set in the first pass.
    """
    TILE: tl.constexpr = 8 * ROWS
    chunk = tl.program_id(0).to(tl.int64)
    layer = find_layer(table, chunk, layers, LAYERS)
    row = table + layer * FIELDS
    start = (chunk - tl.load(row + FIRST_CHUNK)) * (TILES * TILE)
    ranking = tl.load(row + RANKING)
    prefix = tl.load(state + ranking * 2)
    left = tl.minimum(tl.load(row + NUMEL) - start, TILES * TILE).to(tl.int32)
    bins = tl.arange(0, 2**DIGIT)
    found = tl.zeros([2**DIGIT], dtype=tl.int32)
    bad = tl.zeros([ROWS, 8], dtype=tl.int32)
    for tile in range(tl.cdiv(left, TILE)):
        here = left - tile * TILE
        scores = score_tile(row, start + tile * TILE, here, MODE, POWER, ABSOLUTE, ROWS)
        inside = lines(ROWS) < here
        if FIRST:
            bad |= (inside & (scores != scores)).to(tl.int32)
        key = make_key(scores, row, infinity, SCALED)
        if not FIRST:
            inside = inside & ((key >> (SHIFT + DIGIT)).to(tl.int64) == prefix)
        digit = ((key >> SHIFT) & (2**DIGIT - 1)).to(tl.int32)
        found += tl.histogram(
            tl.reshape(digit, (TILE,)), 2**DIGIT, mask=tl.reshape(inside, (TILE,))
        )
    tl.atomic_add(counts + ranking * 2048 + bins, found.to(tl.int64), mask=found > 0, sem="relaxed")
    if FIRST:  # noqa: SIM102, one is a constant, the other is not
        if tl.max(tl.max(bad, 1), 0) > 0:
            tl.store(nan + layer, 1)
    if LAST:
        tl.store(parts + chunk * 2**DIGIT + bins, found)


@triton.jit
def threshold_kernel(
    state, counts, parts, bounds, ties, DIGIT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """One ranking's next digit: the largest with as many scores at or above it as are to be kept.

    Zeroes the counts for the next pass. After the last digit: ties[chunk], how many scores equal to
    the threshold lie in the ranking's chunks before this one.
    """
    ranking = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, 2**DIGIT)
    prefix = tl.load(state + ranking * 2)
    need = tl.load(state + ranking * 2 + 1)
    found = tl.load(counts + ranking * 2048 + bins)
    from_here = tl.sum(found, 0) - tl.cumsum(found, 0) + found
    digit = tl.max(tl.where(from_here >= need, bins, 0), 0)
    above = tl.sum(tl.where(bins > digit, found, 0), 0)
    tl.debug_barrier()  # every thread has read before one writes
    tl.store(counts + ranking * 2048 + bins, tl.zeros([2**DIGIT], dtype=tl.int64))
    tl.store(state + ranking * 2, (prefix << DIGIT) + digit)
    tl.store(state + ranking * 2 + 1, need - above)
    if LAST:
        first, end = tl.load(bounds + ranking), tl.load(bounds + ranking + 1)
        before = tl.zeros([], dtype=tl.int64)
        for block in range(tl.cdiv(end - first, BLOCK)):
            chunk = first + block * BLOCK + tl.arange(0, BLOCK)
            inside = chunk < end
            equal = tl.load(parts + chunk * 2**DIGIT + digit, mask=inside, other=0).to(tl.int64)
            tl.store(ties + chunk, before + tl.cumsum(equal, 0) - equal, mask=inside)
            before += tl.sum(equal, 0)


@triton.jit
def emit_kernel(
    table,
    layers,
    state,
    ties,
    infinity,
    LAYERS: tl.constexpr,
    MODE: tl.constexpr,
    POWER: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The bits: scores above the threshold, and of those equal to it the first ones."""
    TILE: tl.constexpr = 8 * ROWS
    chunk = tl.program_id(0).to(tl.int64)
    row = table + find_layer(table, chunk, layers, LAYERS) * FIELDS
    start = (chunk - tl.load(row + FIRST_CHUNK)) * (TILES * TILE)
    ranking = tl.load(row + RANKING)
    threshold = tl.load(state + ranking * 2)
    need = tl.load(state + ranking * 2 + 1)
    bits = tl.load(row + BITS).to(tl.pointer_type(tl.uint8))
    left = tl.minimum(tl.load(row + NUMEL) - start, TILES * TILE).to(tl.int32)
    before = tl.load(ties + chunk)
    byte = tl.arange(0, ROWS)
    for tile in range(tl.cdiv(left, TILE)):
        here = left - tile * TILE
        begin = start + tile * TILE
        scores = score_tile(row, begin, here, MODE, POWER, ABSOLUTE, ROWS)
        inside = lines(ROWS) < here
        key = (make_key(scores, row, infinity, SCALED) >> SHIFT).to(tl.int64)
        kept = inside & (key > threshold)
        equal = (inside & (key == threshold)).to(tl.int32)
        a_line = tl.sum(equal, 1)
        here_too = tl.sum(a_line, 0)
        if here_too > 0:
            lines_before = tl.cumsum(a_line, 0) - a_line
            rank = before + lines_before[:, None] + tl.cumsum(equal, 1) - equal
            kept = kept | ((equal > 0) & (rank < need))
        before += here_too
        tl.store(bits + begin // 8 + byte, packed(kept), mask=byte * 8 < here)
