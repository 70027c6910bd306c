"""Layouts of weights, row sums, and what holds of a balanced mask on every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paikern import ops
from paikern.ops.balanced_mask import KernelGrid

# shape, groups, transposed: linear, tall, wide, kernels, groups, depthwise, both ways of storing.
LAYOUTS = [
    ((7, 5), 1, False),
    ((5, 7), 1, True),
    ((1, 40), 1, False),
    ((40, 1), 1, False),
    ((6, 4, 3), 1, False),
    ((8, 6, 3, 3), 1, False),
    ((8, 3, 3, 3), 2, False),
    ((6, 4, 2, 2), 2, True),
    ((9, 1, 3, 3), 9, False),
    ((4, 3, 9, 9), 1, False),
    ((3, 2, 2, 3, 2), 1, False),
]


def random_rows(grid: KernelGrid, seed: int, fraction: float = 1.0) -> Tensor:
    most = int(fraction * grid.outputs * grid.positions)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, (grid.groups * grid.inputs,), generator=generator)


def kernels_of(bits: Tensor, grid: KernelGrid, transposed: bool) -> Tensor:
    """Weights of every kernel, `[groups, inputs, outputs]`."""
    groups, inputs, outputs, positions = grid
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    counts = ops.unpack_mask(bits, (groups, first, second, positions)).sum(3)
    return counts if transposed else counts.transpose(1, 2)


def check(
    bits: Tensor, rows: Tensor, grid: KernelGrid, transposed: bool, cover: int | None = None
) -> None:
    counts = kernels_of(bits, grid, transposed)
    assert counts.sum(2).flatten().tolist() == rows.tolist()
    columns = counts.sum(1)  # [groups, outputs]
    uneven = columns.max(1).values - columns.min(1).values > 1
    if cover is None:
        assert not uneven.any()
    else:  # no output is above the others before all have `cover`
        assert bool((columns.min(1).values[uneven] >= cover).all())
    even = rows.view(grid.groups, grid.inputs, 1) // grid.outputs
    assert bool(((counts == even) | (counts == even + 1)).all())
    numel = math.prod(grid)
    spare = ops.unpack_mask(bits, (bits.numel() * 8,))[numel:]
    assert not spare.any()
