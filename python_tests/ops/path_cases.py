"""Shared by the tests of the path operations: weights, masks, geometries, the tolerance rule.

The rule: a kernel may lose no more than torch loses in the same dtype, plus 1e-5, both measured
against float64 and relative to the largest value. Maps are >= 0, as path counts are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from paikern import ops

TOLERANCE = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """A convolution of [batch, groups * channels, *size] to groups * rows channels."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    rows: int = 5
    channels: int = 3
    batch: int = 2

    @property
    def out(self) -> tuple[int, ...]:
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)

    @property
    def valid(self) -> bool:
        return all(
            n + 2 * p >= d * (k - 1) + 1
            for n, k, p, d in zip(self.size, self.kernel, self.padding, self.dilation, strict=True)
        )

    @property
    def args(self) -> tuple[list[int], list[int], list[int], int]:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.groups * self.rows, self.channels, *self.kernel).to(dtype)

    def x(self) -> Tensor:
        return torch.rand(self.batch, self.groups * self.channels, *self.size)

    def g(self) -> Tensor:
        return torch.rand(self.batch, self.groups * self.rows, *self.out)

    def conv(self, x: Tensor, values: Tensor) -> Tensor:
        return CONV[len(self.size)](
            x, values, None, self.stride, self.padding, self.dilation, self.groups
        )

    def __str__(self) -> str:
        parts = ("x".join(map(str, v)) for v in (self.size, self.kernel, self.stride))
        return "-".join((*parts, f"p{self.padding[0]}d{self.dilation[0]}g{self.groups}"))


# Each names a plan: many columns, few columns, strides with unread phases, grouped, depthwise,
# a kernel larger than the map, rows beyond one block of 64, depth beyond one panel of 192.
GEOMETRIES = (
    Geometry((9,), (3,), (1,), (1,), (1,)),
    Geometry((7,), (3,), (3,), (0,), (2,), batch=3),
    Geometry((1,), (4,), (2,), (3,), (1,), groups=2),
    Geometry((12, 11), (3, 3), (1, 1), (1, 1), (1, 1)),
    Geometry((8, 8), (3, 3), (2, 2), (1, 1), (1, 1), rows=70, channels=30),
    Geometry((9, 8), (1, 1), (2, 3), (0, 0), (1, 1), rows=9),
    Geometry((10, 10), (3, 2), (1, 2), (2, 0), (2, 3), groups=3, rows=4),
    Geometry((6, 6), (3, 3), (1, 1), (1, 1), (1, 1), groups=7, rows=1, channels=1),
    Geometry((31, 33), (7, 7), (2, 2), (3, 3), (1, 1), channels=3, rows=17, batch=1),
    Geometry((2, 2), (3, 3), (1, 1), (1, 1), (1, 1), rows=40, channels=64, batch=1),
    Geometry((4, 5, 6), (2, 3, 3), (1, 2, 1), (0, 1, 1), (1, 1, 2), groups=2),
)

# Few positions (path_few.h), and one more or less than it takes: a single position, all of 16, 16
# by the batch, strides, dilation, one and three axes, 256 pixels, rows for several tables of sums;
# then too many positions, too many pixels, too few rows, too little depth, groups.
FEW = (
    Geometry((1, 1), (3, 3), (1, 1), (1, 1), (1, 1), rows=33, channels=17, batch=1),
    Geometry((2, 2), (3, 3), (1, 1), (1, 1), (1, 1), rows=71, channels=33, batch=1),
    Geometry((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), rows=32, channels=15, batch=1),
    Geometry((8, 8), (3, 3), (2, 2), (1, 1), (1, 1), rows=40, channels=16, batch=1),
    Geometry((2, 2), (1, 1), (1, 1), (0, 0), (1, 1), rows=35, channels=131, batch=4),
    Geometry((5, 3), (3, 3), (1, 1), (1, 1), (1, 1), rows=65, channels=20, batch=1),
    Geometry((7, 6), (3, 2), (2, 1), (2, 0), (2, 3), rows=32, channels=22, batch=1),
    Geometry((9,), (4,), (2,), (2,), (2,), rows=33, channels=40, batch=3),
    Geometry((2, 2, 3), (3, 2, 3), (1, 1, 1), (1, 1, 1), (1, 2, 1), rows=34, channels=9, batch=1),
    Geometry((16, 16), (4, 4), (4, 4), (0, 0), (1, 1), rows=32, channels=9, batch=1),
    Geometry((2, 2), (3, 3), (1, 1), (1, 1), (1, 1), rows=1100, channels=15, batch=1),
    Geometry((1, 17), (3, 3), (1, 1), (1, 1), (1, 1), rows=33, channels=33, batch=1),
    Geometry((3, 3), (3, 3), (1, 1), (1, 1), (1, 1), rows=33, channels=33, batch=2),
    Geometry((16, 17), (5, 5), (5, 5), (2, 2), (1, 1), rows=33, channels=6, batch=1),
    Geometry((2, 2), (3, 3), (1, 1), (1, 1), (1, 1), rows=31, channels=33, batch=1),
    Geometry((2, 2), (2, 2), (1, 1), (1, 1), (1, 1), rows=33, channels=31, batch=1),
    Geometry((2, 2), (3, 3), (1, 1), (1, 1), (1, 1), groups=2, rows=33, channels=33, batch=1),
)


def ids(value: object) -> str:
    return str(value).replace("torch.", "")


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    axes = draw(st.integers(1, 3))

    def each(low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.tuples(*[st.integers(low, high)] * axes)

    geometry = st.builds(
        Geometry,
        size=each(1, 10),
        kernel=each(1, 4),
        stride=each(1, 3),
        padding=each(0, 3),
        dilation=each(1, 2),
        groups=st.integers(1, 3),
        rows=st.integers(1, 20),
        channels=st.integers(1, 20),
        batch=st.integers(1, 3),
    )
    return draw(geometry.filter(lambda g: g.valid))


def keep(weight: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """A random mask of that density: bool and packed."""
    mask = torch.rand(weight.shape) < density
    return mask, ops.pack_mask(mask)


def exact(weight: Tensor, power: int, mask: Tensor | None) -> Tensor:
    """V in float64, from the definition."""
    values = weight.double().abs() ** power
    return values if mask is None else torch.where(mask, values, 0.0)


def error(found: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert found.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    return float((found.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def within(found: Tensor, torchs: Tensor, truth: Tensor) -> None:
    """The tolerance rule."""
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    assert error(found, truth) <= error(torchs, truth) + TOLERANCE
