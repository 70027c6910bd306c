"""The native walks (csrc/cpu/phew.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _C

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def phew_tables(weights: Sequence[Tensor], geometry: Tensor, size: int, weighting: int) -> Tensor:
    tables = torch.empty(size, dtype=torch.float32)
    _C.phew_tables(_rows(weights, geometry), weighting, tables.data_ptr())
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
    held = [t.contiguous() for t in (tables, *graph)]
    nodes, starts = held[1], held[6]
    addresses = [t.data_ptr() for t in held[1:]]
    walks = torch.empty((count, width), dtype=torch.int64)
    _C.phew_walks(
        _rows(weights, geometry), held[0].data_ptr(),
        (*addresses, len(starts), int(nodes[-1, 3]), len(nodes) - 1),
        seed % 2**64, first, count, width, weighting, whole, walks.data_ptr(),
    )  # fmt: skip
    return walks


def phew_keep_(
    bits: Tensor, state: Tensor, walks: Tensor, target: int, stall: int, exact: bool
) -> None:
    rows = walks.contiguous()
    count, width = rows.shape
    _C.phew_keep(
        bits.data_ptr(), state.data_ptr(), rows.data_ptr(), count, width, target, stall, exact
    )


def _rows(weights: Sequence[Tensor], geometry: Tensor) -> list[tuple[int, ...]]:
    """Address, type, rows, cols, taps, groups, transposed, first bit, row and column tables."""
    return [
        (w.data_ptr(), _TYPES[w.dtype], *row)
        for w, row in zip(weights, geometry.tolist(), strict=True)
    ]
