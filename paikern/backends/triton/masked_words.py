"""list_positions, transpose_positions, scatter_kept, gather_kept: where the kept weights are.

Both formats of positions become one table: `words`, 32 bits for every 32 columns of a row (rows
begin with a word), and `ranks`, how many weights are kept before each word. The place of a kept
weight among the values is then its rank plus the bits below its own, so that any tile of the weight
can be looked into on its own. 1/4 byte a weight, for the length of a call.

    from bits:       a lane shifts its word out of at most five bytes; ranks are a running sum
    from positions:  a lane finds the first entry of its word by bisection within a panel
    transposed:      counts of 32 rows a column, their running sum, then entries in row order

Nothing is counted by atomics: all of it is exact, ordered by construction and equal to the CPU's
bit for bit. Limits: bandwidth; for positions the latency of a bisection.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import blocks, config, launch

BITS = 32  # of a word
COLUMNS = 1 << 16  # that 16 bits can tell apart
_UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@triton.jit
def ones(word):
    """How many bits of a uint32 are set; compilers know the form."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def kept_in(words, ranks, at, known, bit):
    """Whether bit `bit` of words[at] is set, and the place of its weight among the values."""
    word = tl.load(words + at, mask=known, other=0).to(tl.uint32, bitcast=True)
    rank = tl.load(ranks + at, mask=known, other=0)
    below = ~((bit * 0 - 1) << bit)
    kept = ((word >> bit.to(tl.uint32)) & 1) != 0
    return kept, rank + ones(word & below.to(tl.uint32, bitcast=True))


@triton.jit
def masked_bit_words_kernel(bits, words, counts, number, columns, across, LANES: tl.constexpr):
    """Words of a packed mask, `across` of them a row, `number` in all, and how many bits each."""
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    known = index < number
    row = index // across
    column = (index - row * across) * 32
    bit = row * columns + column
    width = tl.minimum(columns - column, 32)
    first, end = bit >> 3, (bit + width + 7) >> 3
    word = index * 0
    for k in tl.static_range(5):
        there = known & (first + k < end)
        word |= tl.load(bits + first + k, mask=there, other=0).to(tl.int64) << (8 * k)
    word = (word >> (bit & 7)) & ~((index * 0 - 1) << width)
    tl.store(words + index, word.to(tl.int32), mask=known)
    tl.store(counts + index, ones(word.to(tl.uint32)), mask=known)


@triton.jit
def masked_entry_words_kernel(
    positions,
    starts,
    words,
    ranks,
    number,
    panels,
    panel,
    across,
    steps,
    LANES: tl.constexpr,
):
    """Words and ranks of listed positions; `steps` of bisection end it in any panel."""
    index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    known = index < number
    row = index // across
    column = (index - row * across) * 32
    cell = starts + row * panels
    after = tl.minimum((column + 31) // panel + 1, panels)
    low = tl.load(cell + column // panel, mask=known, other=0)
    end = tl.load(cell + after, mask=known, other=0)
    first = (column & 0xFFFF).to(tl.int32)
    high = end
    for _ in range(steps):
        open_ = low < high
        middle = low + (high - low) // 2
        found = tl.load(positions + middle, mask=open_, other=0).to(tl.int32) & 0xFFFF
        before = found < first
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
    tl.store(ranks + index, low, mask=known)
    word = low * 0
    more = low < end
    while tl.max(more.to(tl.int32), 0) > 0:
        local = (tl.load(positions + low, mask=more, other=0).to(tl.int32) & 0xFFFF) - first
        more &= local < 32
        word |= tl.where(more, (low * 0 + 1) << tl.where(more, local, 0), 0)
        low += 1
        more &= low < end
    tl.store(words + index, word, mask=known)


@triton.jit
def masked_positions_kernel(
    words,
    ranks,
    positions,
    starts,
    number,
    columns,
    panels,
    panel,
    across,
    WORDS: tl.constexpr,
):
    """Positions and starts, all but the last, of a table of words."""
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    row = index // across
    bit = tl.arange(0, 32)[None, :]
    column = ((index - row * across) * 32)[:, None] + bit
    known = (index < number)[:, None]
    kept, place = kept_in(words, ranks, index[:, None], known, bit)
    tl.store(positions + place, column.to(tl.int16), mask=kept)
    begins = known & (column < columns) & (column % panel == 0)
    tl.store(starts + (row * panels)[:, None] + column // panel, place, mask=begins)


@triton.jit
def masked_flip_counts_kernel(words, counts, rows, columns, across, bands, WIDTH: tl.constexpr):
    """counts[column, band]: how many of 32 rows keep a column."""
    band = tl.program_id(0) % bands
    row = band.to(tl.int64) * 32 + tl.arange(0, 32)
    column = (tl.program_id(0) // bands).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (row * across)[:, None] + (column // 32)[None, :]
    word = tl.load(words + at, mask=inside, other=0)
    kept = (word >> (column % 32).to(tl.int32)[None, :]) & 1
    tl.store(counts + column * bands + band, tl.sum(kept, 0), mask=column < columns)


@triton.jit
def masked_flip_kernel(
    words,
    ranks,
    flipped,
    positions,
    starts,
    source,
    rows,
    columns,
    across,
    bands,
    panels,
    panel,
    WIDTH: tl.constexpr,
):
    """The transposed weight: `flipped` are the ranks of its columns' bands of 32 rows."""
    band = tl.program_id(0) % bands
    row = band.to(tl.int64) * 32 + tl.arange(0, 32)
    column = (tl.program_id(0) // bands).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = (row * across)[:, None] + (column // 32)[None, :]
    bit = (column % 32).to(tl.int32)[None, :]
    kept, place = kept_in(words, ranks, at, inside, bit)
    first = tl.load(flipped + column * bands + band, mask=column < columns, other=0)
    to = first[None, :] + tl.cumsum(kept.to(tl.int32), 0) - kept.to(tl.int32)
    low = tl.broadcast_to(row[:, None].to(tl.int16), [32, WIDTH])
    tl.store(positions + to, low, mask=kept)
    tl.store(source + to, place, mask=kept)
    begins = inside & (row % panel == 0)[:, None]
    tl.store(starts + (column * panels)[None, :] + (row // panel)[:, None], to, mask=begins)


@triton.jit
def masked_scatter_kernel(
    values,
    dense,
    words,
    ranks,
    number,
    columns,
    across,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """dense [rows, columns], UNITS integers an element."""
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    row = index // across
    bit = tl.arange(0, 32)[None, :]
    column = ((index - row * across) * 32)[:, None] + bit
    known = (index < number)[:, None]
    kept, place = kept_in(words, ranks, index[:, None], known, bit)
    to = (row * columns)[:, None] + column
    for unit in tl.static_range(UNITS):
        value = tl.load(values + place.to(tl.int64) * UNITS + unit, mask=kept, other=0)
        tl.store(dense + to * UNITS + unit, value, mask=known & (column < columns))


@triton.jit
def masked_gather_kernel(
    values,
    dense,
    words,
    ranks,
    number,
    columns,
    across,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """values [kept], UNITS integers an element."""
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    row = index // across
    bit = tl.arange(0, 32)[None, :]
    at = (row * columns)[:, None] + ((index - row * across) * 32)[:, None] + bit
    known = (index < number)[:, None]
    kept, place = kept_in(words, ranks, index[:, None], known, bit)
    for unit in tl.static_range(UNITS):
        value = tl.load(dense + at * UNITS + unit, mask=kept, other=0)
        tl.store(values + place.to(tl.int64) * UNITS + unit, value, mask=kept)


class Words(NamedTuple):
    """The table: words [rows, across] and ranks beside them, after which the total may follow."""

    words: Tensor
    ranks: Tensor
    across: int


def panels_of(columns: int, panel: int) -> int:
    return blocks(columns, panel)


def words_of(positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int) -> Words:
    """The table of a weight with rows and columns, of positions in either format."""
    across = blocks(columns, BITS)
    number = rows * across
    positions = positions.contiguous()
    words = positions.new_empty(number, dtype=torch.int32)
    sizes = config().packed
    grid = (blocks(number, sizes.words),)
    if positions.dtype == torch.uint8:
        counts = torch.empty_like(words)
        launch(
            masked_bit_words_kernel, grid, words, positions, words, counts, number, columns,
            across, LANES=sizes.words, warps=sizes.warps,
        )  # fmt: skip
        return Words(words, _before(counts), across)
    ranks = torch.empty_like(words)
    steps = max(min(panel, columns), BITS).bit_length()
    launch(
        masked_entry_words_kernel, grid, words, positions, starts.contiguous(), words, ranks,
        number, panels_of(columns, panel), panel, across, steps, LANES=sizes.words,
        warps=sizes.warps,
    )  # fmt: skip
    return Words(words, ranks, across)


def _before(counts: Tensor) -> Tensor:
    """The sums of all counts before each, and of all of them."""
    total = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, dtype=torch.int32, out=total[1:])
    return total


def list_positions(
    mask: Tensor, kept: int, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor]:
    panels = panels_of(columns, panel)
    table = words_of(mask, mask, rows, columns, panel)
    found = int(table.ranks[-1])
    if found != kept:
        raise ValueError(f"list_positions: {found} bits are set, kept says {kept}")
    positions = mask.new_empty(kept, dtype=torch.int16)
    starts = mask.new_empty(rows * panels + 1, dtype=torch.int32)
    sizes, number = config().packed, table.words.numel()
    launch(
        masked_positions_kernel, (blocks(number, sizes.tile),), mask, table.words, table.ranks,
        positions, starts, number, columns, panels, panel, table.across, WORDS=sizes.tile,
        warps=sizes.warps,
    )  # fmt: skip
    starts[-1:].fill_(kept)
    return positions, starts


def transpose_positions(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    table = words_of(positions, starts, rows, columns, panel)
    bands, panels = blocks(rows, BITS), panels_of(rows, panel)
    counts = starts.new_empty(columns * bands)
    width, warps = config().packed.tile, config().packed.warps
    grid = (bands * blocks(columns, width),)
    launch(
        masked_flip_counts_kernel, grid, starts, table.words, counts, rows, columns, table.across,
        bands, WIDTH=width, warps=warps,
    )  # fmt: skip
    moved, source = torch.empty_like(positions), starts.new_empty(positions.shape)
    begins = starts.new_empty(columns * panels + 1)
    launch(
        masked_flip_kernel, grid, starts, table.words, table.ranks, _before(counts), moved, begins,
        source, rows, columns, table.across, bands, panels, panel, WIDTH=width, warps=warps,
    )  # fmt: skip
    begins[-1:].fill_(positions.numel())
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
    values = values.contiguous()
    dense = values.new_empty(rows, columns)
    _move(masked_scatter_kernel, values, dense, words_of(positions, starts, rows, columns, panel))
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
    dense = dense.contiguous()
    values = dense.new_empty(kept)
    _move(masked_gather_kernel, values, dense, words_of(positions, starts, rows, columns, panel))
    return values


def _move(kernel: Any, values: Tensor, dense: Tensor, table: Words) -> None:
    """Bits are moved as integers, whatever they mean."""
    size, unit = dense.element_size(), _UNITS[dense.element_size()]
    number, sizes = table.words.numel(), config().packed
    launch(
        kernel, (blocks(number, sizes.tile),), dense, values.view(unit), dense.view(unit),
        table.words, table.ranks, number, dense.shape[1], table.across, UNITS=max(1, size // 8),
        WORDS=sizes.tile, warps=sizes.warps,
    )  # fmt: skip
