"""The native sweeps and the loops on them (csrc/cpu/flow.h, dpai_loop.h, path_rounds.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paikern import _C
from paikern.backends.cpu_path import convolution_geometry, linear_geometry

path_flow = _C.PathFlow
dpai_loop = _C.DpaiLoop
path_rounds = _C.PathRounds

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def weight_type(dtype: torch.dtype) -> int | None:
    """The code of a weight's dtype, None where no native kernel reads it."""
    return _TYPES.get(dtype)


def path_geometry(
    weight: tuple[int, ...],
    columns: tuple[int, ...],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> _C.PathGeometry:
    """Of a weight shape and the map of its columns: `[..., in]`, or `[batch, in, *size]`."""
    if len(weight) == 2:
        batch = 1
        for n in columns[:-1]:
            batch *= n
        return linear_geometry(batch, *weight)
    shape = tuple(columns)
    axes = tuple(stride), tuple(padding), tuple(dilation)
    return convolution_geometry(weight, shape, *axes, groups)[0]
