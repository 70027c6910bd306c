"""Shared by the tests of packed convolutions: cases and the float64 truth.

The tolerance rule is that of masked_linear_cases.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import paikern as pk
from python_tests.ops.masked_linear_cases import within


class Case(NamedTuple):
    packed: pk.PackedWeight
    dense: Tensor  # [out, in / groups, kh, kw], W * M
    mask: Tensor  # [out, in / groups * kh * kw]
    bias: Tensor
    conv: dict[str, Any]  # what F.conv2d takes besides

    def run(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        kernel = self.dense.shape[2:]
        return pk.ops.masked_conv2d(x, self.packed, bias, kernel=kernel, **self.conv)

    def where(self) -> tuple[Any, ...]:
        """The arguments of the operations behind the values (and the bias)."""
        return (*self.packed.where(transposed=True), *self.geometry())

    def geometry(self) -> tuple[Any, ...]:
        def pair(name: str, other: int) -> list[int]:
            value = self.conv.get(name, other)
            return [value, value] if isinstance(value, int) else list(value)

        return (
            list(self.dense.shape[2:]),
            pair("stride", 1),
            pair("padding", 0),
            pair("dilation", 1),
            self.conv.get("groups", 1),
        )


def make(
    rows: int,
    channels: int,
    kernel: tuple[int, int],
    density: float,
    dtype: torch.dtype = torch.float32,
    *,
    format: str = "index",
    panel: int = 4096,
    **conv: Any,
) -> Case:
    """A random weight, NaN wherever the mask is 0."""
    columns = channels // conv.get("groups", 1) * kernel[0] * kernel[1]
    weight = torch.randn(rows, columns).to(dtype)
    mask = torch.rand(rows, columns) < density
    if rows > 2:
        mask[rows // 2] = False  # an empty row
    poisoned = torch.where(mask, weight, torch.nan)
    packed = pk.PackedWeight.from_dense(poisoned, mask, format=format, panel=panel)
    dense = weight.masked_fill(~mask, 0.0).reshape(rows, channels // conv.get("groups", 1), *kernel)
    return Case(packed, dense, mask, torch.randn(rows).to(dtype), conv)


def check(case: Case, x: Tensor, *, bias: bool = True) -> None:
    """Forward and all gradients against float64."""
    x = x.detach().requires_grad_()
    add = case.bias.clone().requires_grad_() if bias else None
    y = case.run(x, add)
    g = torch.randn(y.shape).to(y.dtype)
    inputs = [x, case.packed.values, *([add] if add is not None else [])]
    found = torch.autograd.grad(y, inputs, g)
    torchs, truth = (_dense(case, x, add, g, dtype) for dtype in (x.dtype, torch.float64))
    for ours, theirs, true in zip((y.detach(), *found), torchs, truth, strict=True):
        within(ours, theirs, true)


def _dense(
    case: Case, x: Tensor, bias: Tensor | None, g: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, case.dense))
    add = None if bias is None else bias.detach().to(dtype).requires_grad_()
    y = F.conv2d(x, weight, add, **case.conv)
    inputs = [x, weight, *([add] if add is not None else [])]
    by_x, by_weight, *rest = torch.autograd.grad(y, inputs, g.to(dtype))
    return [y.detach(), by_x, by_weight.reshape(case.mask.shape)[case.mask], *rest]
