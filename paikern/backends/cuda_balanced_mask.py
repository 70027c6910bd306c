"""balanced_mask by CUDA (csrc/cuda/balanced_mask.cuh)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.cuda_launch import THREADS, Step, elementwise, run
from paikern.backends.errors import refuse_nan

__all__ = ["balanced_mask"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_LAP_THREADS = 32  # of a block: laps are spread over the device


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
    given, values = rows.contiguous(), scores.detach().contiguous()
    bits = given.new_empty((count + 7) // 8, dtype=torch.uint8)
    if count == 0:
        return bits
    starts = given.new_empty(groups * (inputs + 1))
    laps, nan = given.new_empty(groups), given.new_zeros(1)
    order = given.new_empty(kernels, dtype=torch.int32)
    favourites = given.new_empty(groups * outputs, dtype=torch.int32)
    seen = given.new_full((groups * outputs,), -1, dtype=torch.int32)
    extra = given.new_zeros(kernels, dtype=torch.uint8)
    ranked = values.numel() > 0
    task = torch.tensor(
        [
            given.data_ptr(), *grid, int(transposed), cover, seed, stream,
            *(t.data_ptr() for t in (starts, laps, order, favourites, seen, extra, bits)),
            values.data_ptr() if ranked else 0, _TYPES[values.dtype], nan.data_ptr(),
        ],
        dtype=torch.int64,
    ).to(rows.device)  # fmt: skip
    at = task.data_ptr()
    each_lap = groups * (inputs + 1)
    steps = [
        Step("paikern_balanced_starts", groups, (at,)),
        Step("paikern_balanced_laps", -(-each_lap // _LAP_THREADS), (at,), _LAP_THREADS),
        Step("paikern_balanced_deal", groups, (at,)),
        Step("paikern_balanced_mark", groups * inputs, (at,), THREADS // 2),
    ]
    if ranked or positions == 1:
        steps.append(elementwise("paikern_balanced_rank", count, at))
    else:
        steps.append(elementwise("paikern_balanced_draw", (kernels + 7) // 8, at))
    run(rows, steps)
    if ranked:
        refuse_nan("balanced_mask", 0 if int(nan) else -1)
    return bits
