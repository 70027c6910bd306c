"""Shared by the tests of packed weights: cases, the float64 truth, the tolerance rule.

The rule: a kernel may lose no more than torch loses with the same dense weight in the same dtype,
plus a constant of the dtype, both measured against float64 and relative to the largest value, or
to the largest sum of the terms' magnitudes: one sum of many terms may happen to be next to 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import paikern as pk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXCESS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}
DENSITIES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)


class Case(NamedTuple):
    packed: pk.PackedWeight
    dense: Tensor  # W * M
    mask: Tensor
    bias: Tensor


def make(
    rows: int,
    columns: int,
    density: float,
    dtype: torch.dtype = torch.float32,
    *,
    format: str = "index",
    panel: int = 4096,
) -> Case:
    """A random weight, NaN wherever the mask is 0."""
    weight = torch.randn(rows, columns).to(dtype)
    mask = torch.rand(rows, columns) < density
    if rows > 2:
        mask[rows // 2] = False  # an empty row
    poisoned = torch.where(mask, weight, torch.nan)
    packed = pk.PackedWeight.from_dense(poisoned, mask, format=format, panel=panel)
    return Case(packed, weight.masked_fill(~mask, 0.0), mask, torch.randn(rows).to(dtype))


def error(found: Tensor, truth: Tensor, size: Tensor | None = None) -> float:
    """Largest difference relative to the largest value, or to the largest of `size`."""
    assert found.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    largest = (truth if size is None else size).abs().max().clamp_min(1e-30)
    return float((found.double() - truth).abs().max() / largest)


def within(found: Tensor, torchs: Tensor, truth: Tensor, size: Tensor | None = None) -> None:
    assert bool(torch.isfinite(found).all())
    assert found.dtype == torchs.dtype
    assert error(found, truth, size) <= error(torchs, truth, size) + EXCESS[found.dtype]


def check(case: Case, x: Tensor, *, bias: bool = True) -> None:
    """Forward and all gradients of `masked_linear` against float64."""
    x = x.detach().requires_grad_()
    add = case.bias.clone().requires_grad_() if bias else None
    y = pk.ops.masked_linear(x, case.packed, add)
    g = torch.randn(y.shape).to(y.dtype)
    inputs = [x, case.packed.values, *([add] if add is not None else [])]
    by_x, by_values, *by_bias = torch.autograd.grad(y, inputs, g)

    dense, double = case.dense, case.dense.double()
    flat_x, flat_g = x.detach().reshape(-1, dense.shape[1]), g.reshape(-1, dense.shape[0])
    truth = torch.nn.functional.linear(
        x.detach().double(), double, None if add is None else add.detach().double()
    )
    torchs = torch.nn.functional.linear(x.detach(), dense, None if add is None else add.detach())
    wide_x, wide_g = flat_x.double(), flat_g.double()
    size = wide_x.abs() @ double.abs().T
    if add is not None:
        size = size + add.detach().double().abs()
    within(y.detach(), torchs, truth, size)
    within(by_x, g @ dense, g.double() @ double, wide_g.abs() @ double.abs())
    torch_values = (flat_g.T @ flat_x)[case.mask]
    sizes = (wide_g.abs().T @ wide_x.abs())[case.mask]
    within(by_values, torch_values, (wide_g.T @ wide_x)[case.mask], sizes)
    if by_bias:
        within(by_bias[0], flat_g.sum(0), wide_g.sum(0), wide_g.abs().sum(0))
