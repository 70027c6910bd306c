"""map_maximum, map_scale_, live_nodes, through_maximum_: passes over maps between weight steps.

Bytes moved: every map once, twice where it is written. Maps are small: the limit is the launch.
Sums and maxima go through one value a program and a second kernel in fixed order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import ctypes
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import blocks, config, launch


@triton.jit
def maximum_kernel(values, out, numel, TILE: tl.constexpr, STEPS: tl.constexpr):
    """out[program]: the largest of STEPS tiles; NaN if there is one."""
    start = tl.program_id(0).to(tl.int64) * (TILE * STEPS)
    best = tl.full([TILE], float("-inf"), dtype=tl.float32)
    bad = tl.zeros([TILE], dtype=tl.int32)
    for step in range(STEPS):
        index = start + step * TILE + tl.arange(0, TILE)
        value = tl.load(values + index, mask=index < numel, other=float("-inf")).to(tl.float32)
        bad |= (value != value).to(tl.int32)
        best = tl.maximum(best, tl.where(value != value, float("-inf"), value))
    nan = tl.max(bad, 0) > 0
    tl.store(out + tl.program_id(0), tl.where(nan, float("nan"), tl.max(best, 0)))


@triton.jit
def scale_kernel(values, numel, factor, floor, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < numel
    value = tl.load(values + index, mask=inside, other=0.0).to(tl.float32)
    scaled = value * factor
    scaled = tl.where((value > 0) & (scaled < floor), floor, scaled)
    tl.store(values + index, scaled.to(values.dtype.element_ty), mask=inside)


@triton.jit
def live_nodes_kernel(y, g, out, channels, inner, each, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """out[channel]: whether any of its `each` entries, [outer, channels, inner], has a path."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    found = tl.zeros([CHANNELS], dtype=tl.int32)
    for block in range(tl.cdiv(each, TILE)):
        entry = block * TILE + tl.arange(0, TILE).to(tl.int64)
        outer = entry // inner
        index = (outer[:, None] * channels + channel[None, :]) * inner
        index += (entry - outer * inner)[:, None]
        inside = (entry < each)[:, None] & (channel < channels)[None, :]
        comes = tl.load(y + index, mask=inside, other=0.0) > 0
        leaves = tl.load(g + index, mask=inside, other=0.0) != 0
        found = tl.maximum(found, tl.max((comes & leaves).to(tl.int32), 0))
    tl.store(out + channel, found.to(tl.uint8), mask=channel < channels)


@triton.jit
def dot_kernel(g, x, dots, ties, numel, TILE: tl.constexpr, STEPS: tl.constexpr):
    """dots[program], ties[program]: sums of g * x in float64 and counts of x == 1."""
    start = tl.program_id(0).to(tl.int64) * (TILE * STEPS)
    total = tl.zeros([TILE], dtype=tl.float64)
    ones = tl.zeros([TILE], dtype=tl.int64)
    for step in range(STEPS):
        index = start + step * TILE + tl.arange(0, TILE)
        left = tl.load(g + index, mask=index < numel, other=0.0).to(tl.float64)
        right = tl.load(x + index, mask=index < numel, other=0.0)
        total += left * right.to(tl.float64)
        ones += (right == 1.0).to(tl.int64)
    tl.store(dots + tl.program_id(0), tl.sum(total, 0))
    tl.store(ties + tl.program_id(0), tl.sum(ones, 0))


@triton.jit
def share_kernel(dots, ties, out, count, TILE: tl.constexpr):
    """out[0] = (1 - sum of dots) / ties: what each entry at the maximum receives."""
    total = tl.zeros([TILE], dtype=tl.float64)
    ones = tl.zeros([TILE], dtype=tl.int64)
    for block in range(tl.cdiv(count, TILE)):
        index = block * TILE + tl.arange(0, TILE)
        total += tl.load(dots + index, mask=index < count, other=0.0)
        ones += tl.load(ties + index, mask=index < count, other=0)
    shared = tl.maximum(tl.sum(ones, 0), 1).to(tl.float64)
    tl.store(out, ((1.0 - tl.sum(total, 0)) / shared).to(tl.float32))


@triton.jit
def through_maximum_kernel(g, x, share, maximum, numel, TILE: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < numel
    slope = tl.load(g + index, mask=inside, other=0.0)
    slope += tl.where(tl.load(x + index, mask=inside, other=0.0) == 1.0, tl.load(share), 0.0)
    tl.store(g + index, tl.div_rn(slope, maximum + tl.zeros([TILE], dtype=tl.float32)), mask=inside)


_STEPS = 8


def map_maximum(t: Tensor) -> float:
    if t.numel() == 0:
        return 0.0
    tile, warps = 8 * config().flat.rows, config().flat.warps
    values = t.detach().contiguous()
    while values.numel() > 1 or values.dtype != torch.float32:
        count = blocks(values.numel(), tile * _STEPS)
        out = values.new_empty(count, dtype=torch.float32)
        launch(
            maximum_kernel, (count,), t, values, out, values.numel(), TILE=tile, STEPS=_STEPS,
            warps=warps,
        )  # fmt: skip
        values = out
    return float(values)


def _power_of_two(by: int) -> float:
    """2**by as float32 has it: infinity above, 0 below."""
    return math.inf if by > 127 else ctypes.c_float(math.ldexp(1.0, max(by, -200))).value


def map_scale_(t: Tensor, by: int, floor: float) -> Tensor:
    tile, warps = 8 * config().flat.rows, config().flat.warps
    launch(
        scale_kernel, (blocks(t.numel(), tile),), t, t, t.numel(), _power_of_two(by),
        floor if floor > 0 else -math.inf, TILE=tile, warps=warps,
    )  # fmt: skip
    return t


def live_nodes(y: Tensor, g: Tensor, dim: int) -> Tensor:
    y, g = y.contiguous(), g.contiguous()
    dim %= y.dim()
    channels, inner = y.shape[dim], math.prod(y.shape[dim + 1 :])
    each = math.prod(y.shape[:dim]) * inner
    live = torch.empty(channels, dtype=torch.uint8, device=y.device)
    tile, warps = config().flat
    launch(
        live_nodes_kernel, (blocks(channels, 8),), y, y, g, live, channels, inner, each, CHANNELS=8,
        TILE=tile, warps=warps,
    )  # fmt: skip
    return live


def through_maximum_(g: Tensor, x: Tensor, maximum: float) -> Tensor:
    x, numel = x.contiguous(), g.numel()
    tile, warps = 8 * config().flat.rows, config().flat.warps
    count = blocks(numel, tile * _STEPS)
    dots = torch.empty(count, dtype=torch.float64, device=g.device)
    ties = torch.empty(count, dtype=torch.int64, device=g.device)
    share = torch.empty(1, dtype=torch.float32, device=g.device)
    launch(dot_kernel, (count,), g, g, x, dots, ties, numel, TILE=tile, STEPS=_STEPS, warps=warps)
    launch(share_kernel, (1,), g, dots, ties, share, count, TILE=tile, warps=warps)
    launch(
        through_maximum_kernel, (blocks(numel, tile),), g, g, x, share, maximum, numel, TILE=tile,
        warps=warps,
    )  # fmt: skip
    return g
