"""Passes over maps by CUDA (csrc/cuda/maps.cuh)."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from paikern.backends.cuda_launch import THREADS, Step, run
from paikern.backends.cuda_layers import TYPES

__all__ = ["live_nodes", "map_maximum", "map_scale_", "through_maximum_"]

_SHARE = 8192  # kPkShare
_BLOCKS = 2112  # from where on blocks go on: several for each multiprocessor


def _blocks(count: int, each: int) -> int:
    return min(-(-count // each), _BLOCKS)


def map_maximum(t: Tensor) -> float:
    if t.numel() == 0:
        return 0.0
    t = t.detach().contiguous()
    top = torch.zeros(1, dtype=torch.int64, device=t.device)
    arguments = (t.data_ptr(), TYPES[t.dtype], t.numel(), top.data_ptr())
    run(t, [Step("paikern_map_maximum", _blocks(t.numel(), 4 * THREADS), arguments)])
    key = int(top)
    if key == 0xFFFFFFFF:
        return math.nan
    bits = key ^ 0x80000000 if key & 0x80000000 else ~key & 0xFFFFFFFF
    return ctypes.c_float.from_buffer(ctypes.c_uint32(bits)).value


def power_of_two(by: int) -> float:
    """2**by as float32 has it: infinity above, 0 below."""
    return math.inf if by > 127 else ctypes.c_float(math.ldexp(1.0, max(by, -200))).value


def map_scale_(t: Tensor, by: int, floor: float) -> Tensor:
    held = t.detach().to(torch.float32).contiguous()
    arguments = (held.data_ptr(), held.numel(), power_of_two(by), float(max(floor, 0.0)))
    run(held, [Step("paikern_map_scale", _blocks(held.numel(), 4 * THREADS), arguments)])
    if held.data_ptr() != t.data_ptr():
        t.copy_(held)
    return t


def live_nodes(y: Tensor, g: Tensor, dim: int) -> Tensor:
    y, g = (t.detach().to(torch.float32).contiguous() for t in (y, g))
    dim %= y.dim()
    outer, channels = math.prod(y.shape[:dim]), y.shape[dim]
    inner = math.prod(y.shape[dim + 1 :])
    if y.numel() == 0:
        return torch.zeros(channels, dtype=torch.uint8, device=y.device)
    live = torch.empty(channels, dtype=torch.uint8, device=y.device)
    arguments = (y.data_ptr(), g.data_ptr(), outer, channels, inner, live.data_ptr())
    run(y, [Step("paikern_live_nodes", min(channels, _BLOCKS), arguments)])
    return live


def through_maximum_(g: Tensor, x: Tensor, maximum: float) -> Tensor:
    count = g.numel()
    if count == 0:
        return g
    held, x = (t.detach().to(torch.float32).contiguous() for t in (g, x))
    parts = -(-count // _SHARE)
    # The sums of the parts, then what is zero before: ties, arrivals and, written last, the share.
    room = torch.zeros(parts + 3, dtype=torch.float64, device=g.device)
    dots, rest = room.data_ptr(), room.data_ptr() + 8 * parts
    ties, arrived, share = rest, rest + 8, rest + 16
    maps = (held.data_ptr(), x.data_ptr(), count)
    steps = [
        Step("paikern_map_share", min(parts, _BLOCKS), (*maps, dots, ties, arrived, share)),
        Step("paikern_through_maximum", _blocks(count, THREADS), (*maps, share, float(maximum))),
    ]
    run(held, steps)
    if held.data_ptr() != g.data_ptr():
        g.copy_(held)
    return g
