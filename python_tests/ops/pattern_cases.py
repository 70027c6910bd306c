"""Shared by the tests of structured masks: brute force, group by group and block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from python_tests.ops.selection_cases import DTYPES, KINDS, make_scores

# Linear, ragged, Conv1d, Conv2d, a kernel of one, nothing at all, several tiles.
SHAPES = (
    (3, 8),
    (5, 16),
    (1, 40),
    (7, 13),
    (2, 100),
    (40, 1),
    (6, 17, 2),
    (4, 6, 3, 3),
    (2, 9, 1, 1),
)
SHAPES += ((3, 64, 5), (0, 8), (8, 0), (2, 5, 70), (30, 300))
LAYOUTS = ("contiguous", "transposed", "channels_last", "spread", "reversed")


@dataclass(frozen=True)
class Groups:
    scores: list[Tensor]
    n: int
    m: int
    dims: list[int]
    absolute: bool


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at other addresses."""
    if layout == "transposed":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "spread":
        return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0]
    if layout == "reversed":
        order = list(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    return tensor.contiguous()


@st.composite
def group_problems(draw: st.DrawFn) -> Groups:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m = draw(st.integers(1, 16) | st.sampled_from([17, 20, 33, 64]))
    scores, dims = [], []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from(SHAPES))
        kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
        flat = make_scores(generator, math.prod(shape), kind, dtype, "contiguous")
        scores.append(laid_out(flat.reshape(shape), draw(st.sampled_from(LAYOUTS))))
        dims.append(draw(st.integers(0, len(shape) - 1)))
    return Groups(scores, draw(st.integers(1, m)), m, dims, draw(st.booleans()))


def best_of_groups(scores: Tensor, n: int, m: int, dim: int, absolute: bool) -> Tensor:
    """Bool mask by Python's sort of every group."""
    values = scores.detach().double().movedim(dim, -1)
    values = values.abs() if absolute else values
    lines = values.reshape(-1, scores.shape[dim] or 1).tolist() if scores.numel() else []
    kept = []
    for line in lines:
        keep = [False] * len(line)
        for first in range(0, len(line), m):
            group = range(first, min(first + m, len(line)))
            ranked = sorted(group, key=lambda i: (-line[i], i))
            for i in ranked[: -(-len(group) * n // m)]:
                keep[i] = True
        kept.append(keep)
    mask = torch.tensor(kept, dtype=torch.bool).reshape(values.shape)
    return mask.movedim(-1, dim)


def mean_of_blocks(scores: Tensor, block: Sequence[int], absolute: bool) -> Tensor:
    """Float64, each sum in the promised order, by hand."""
    matrix = scores.detach().double().reshape(scores.shape[0], -1)
    matrix = matrix.abs() if absolute else matrix
    rows = []
    for top in range(0, matrix.shape[0], block[0]):
        means = []
        for left in range(0, matrix.shape[1], block[1]):
            part = matrix[top : top + block[0], left : left + block[1]].tolist()
            lanes = [0.0] * 8
            for line in part:
                for j, value in enumerate(line):
                    lanes[j % 8] += value
            total = lanes[0]
            for lane in lanes[1:]:
                total += lane
            means.append(total / (len(part) * len(part[0])))
        rows.append(means)
    return torch.tensor(rows, dtype=torch.float64)


def unpacked(packed: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """Bool masks, after a look at lengths and spare bits."""
    for bits, tensor in zip(packed, scores, strict=True):
        assert bits.dtype == torch.uint8
        assert bits.shape == ((tensor.numel() + 7) // 8,)
        assert not tensor.numel() % 8 or int(bits[-1]) >> tensor.numel() % 8 == 0
    return [ops.unpack_mask(bits, t.shape) for bits, t in zip(packed, scores, strict=True)]
