"""The native passes over the maps between two weight steps (csrc/cpu/maps.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from paikern import _C


def map_maximum(t: Tensor) -> float:
    return _C.map_maximum(t.data_ptr(), t.numel())


def map_scale_(t: Tensor, by: int, floor: float) -> Tensor:
    _C.map_scale(t.data_ptr(), t.numel(), by, floor)
    return t


def live_nodes(y: Tensor, g: Tensor, dim: int) -> Tensor:
    y, g = y.contiguous(), g.contiguous()
    channels = y.shape[dim]
    outer = 1
    for n in y.shape[: dim % y.dim()]:
        outer *= n
    live = torch.empty(channels, dtype=torch.uint8)
    inner = y.numel() // max(1, outer * channels)
    _C.live_nodes(y.data_ptr(), g.data_ptr(), outer, channels, inner, live.data_ptr())
    return live


def through_maximum_(g: Tensor, x: Tensor, maximum: float) -> Tensor:
    x = x.contiguous()
    _C.through_maximum(g.data_ptr(), x.data_ptr(), g.numel(), maximum)
    return g
