"""Biased random walks by CUDA (csrc/cuda/phew_{tables,walks,keep}.cuh)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.cuda_launch import Step, elementwise, run
from paikern.backends.walk_blocks import column_block, row_block, table_blocks

__all__ = ["phew_keep_", "phew_tables", "phew_walks"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_WALK_THREADS = 32  # of a block: a batch of few walks is spread over the device
_KEEP_THREADS = 1024  # phew_keep.cuh


def _sides(weights: Sequence[Tensor], geometry: Tensor) -> tuple[list[tuple[int, ...]], int, int]:
    """Rows and columns of every weight as PaikernSide; how many entries and lists they have."""
    rows: list[tuple[int, ...]] = []
    entries = lists = 0
    for weight, numbers in zip(weights, geometry.tolist(), strict=True):
        high, cols, taps, groups, _, _, by_row, by_col = numbers
        across, down = table_blocks(high, cols, taps, groups)
        for column, count, blocks, block, begin in (
            (0, high, across, row_block(taps), by_row),
            (1, groups * cols, down, column_block(taps), by_col),
        ):
            rows.append(
                (entries, lists, weight.data_ptr(), _TYPES[weight.dtype], cols, taps,
                 high // groups, column, count, blocks, block, begin)
            )  # fmt: skip
            entries += count * blocks
            lists += count
    return rows, entries, lists


def phew_tables(weights: Sequence[Tensor], geometry: Tensor, size: int, weighting: int) -> Tensor:
    tables = geometry.new_empty(size, dtype=torch.float32)
    rows, entries, lists = _sides(weights, geometry)
    sides = torch.tensor(rows, dtype=torch.int64).to(geometry.device)
    sums = geometry.new_empty(entries, dtype=torch.float64)
    count = len(rows)
    steps = [
        elementwise(
            "paikern_phew_sums", entries, sides.data_ptr(), count, entries, weighting,
            sums.data_ptr(),
        ),
        elementwise(
            "paikern_phew_shares", lists, sides.data_ptr(), count, lists, sums.data_ptr(),
            tables.data_ptr(),
        ),
    ]  # fmt: skip
    run(geometry, steps)
    return tables


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
    addresses = torch.tensor(
        [(w.data_ptr(), _TYPES[w.dtype]) for w in weights], dtype=torch.int64
    ).view(-1, 2)
    rows = torch.cat([addresses.to(geometry.device), geometry], 1)
    held = [tables.contiguous(), *(t.contiguous() for t in graph)]
    nodes, starts = held[1], held[6]
    graph_at = torch.tensor(
        [rows.data_ptr(), *(t.data_ptr() for t in held), len(nodes), len(starts)],
        dtype=torch.int64,
    ).to(geometry.device)
    walks = geometry.new_full((count, width), -1)
    blocks = (count + _WALK_THREADS - 1) // _WALK_THREADS
    arguments = (
        graph_at.data_ptr(), seed, first, count, width, weighting, int(whole), walks.data_ptr(),
    )  # fmt: skip
    run(geometry, [Step("paikern_phew_walks", blocks, arguments, _WALK_THREADS)])
    return walks


def phew_keep_(
    bits: Tensor, state: Tensor, walks: Tensor, target: int, stall: int, exact: bool
) -> None:
    rows = walks.contiguous()
    count, width = rows.shape
    words = bits
    if bits.numel() % 4 or bits.data_ptr() % 4:  # the kernel sets bits of 32-bit words
        words = bits.new_zeros((bits.numel() + 3) // 4 * 4)
        words[: bits.numel()] = bits
    repeats = bits.new_empty(rows.shape)
    place = (rows.data_ptr(), count, width, state.data_ptr(), target, repeats.data_ptr())
    arguments = (
        words.data_ptr(), state.data_ptr(), rows.data_ptr(), repeats.data_ptr(), count, width,
        target, stall, int(exact),
    )  # fmt: skip
    steps = [
        elementwise("paikern_phew_repeats", rows.numel(), *place),
        Step("paikern_phew_keep", 1, arguments, _KEEP_THREADS),
    ]
    run(bits, steps)
    if words is not bits:
        bits.copy_(words[: bits.numel()])
