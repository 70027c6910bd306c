"""The CPU backend of balanced_mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _C
from paikern.backends.errors import refuse_nan


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
    given = rows.contiguous()
    wide = scores.dtype == torch.float64
    values = (scores.detach() if wide else scores.detach().float()).contiguous()
    bits = torch.empty((math.prod(grid) + 7) // 8, dtype=torch.uint8)
    ranked = _C.balanced_mask(
        given.data_ptr(),
        groups,
        inputs,
        outputs,
        positions,
        transposed,
        cover,
        seed % 2**64,
        stream,
        values.data_ptr() if values.numel() else 0,
        wide,
        bits.data_ptr(),
    )
    refuse_nan("balanced_mask", -1 if ranked else 0)
    return bits
