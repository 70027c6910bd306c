"""path_forward: weighted paths through a linear layer, |W|**p x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern.ops._library import autograd, define, fake
from paikern.ops._path import check_map, check_weight, result_dtype, run, save, slope

define("path_forward(Tensor weight, Tensor x, int power, Tensor? mask) -> Tensor")


@fake("path_forward")
def _shape(weight: Tensor, x: Tensor, power: int, mask: Tensor | None) -> Tensor:
    dtype = result_dtype(weight, power, x)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, x, power, mask = inputs
    save(ctx, weight, x, power, mask)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, x, mask = ctx.saved_tensors
    ops = torch.ops.paikern
    by_weight = by_x = None
    if ctx.needs_input_grad[0] and ctx.power:
        by_weight = slope(weight, ctx.power, ops.path_score(weight, x, grad, 0, mask, 0.0))
    if ctx.needs_input_grad[1]:
        by_x = ops.path_backward(weight, grad, ctx.power, mask).to(ctx.source_dtype)
    return by_weight, by_x, None, None


autograd("path_forward", _derivative, _setup)


def path_forward(
    weight: Tensor, x: Tensor, *, power: int = 1, mask: Tensor | None = None
) -> Tensor:
    """`x @ (weight.abs()**power * unpack_mask(mask)).T`, without the product in memory.

    Args:
        weight: `[out, in]`, float32, float16, bfloat16 or float64. With power 0 only its shape
            counts: V is the mask, or all ones.
        x: `[in]` or `[batch, in]`, any float dtype, finite.
        power: 0, 1 or 2.
        mask: packed bits of the weight; a weight under a 0 bit counts as 0, NaN too.

    Returns:
        `[out]` or `[batch, out]`, float32 (float64 where x or the weight is). Sums are float32 and
        the same for every number of threads. Differentiable in x and weight; the mask is constant.

    Raises:
        ValueError: shapes that do not fit, another power. TypeError: not float tensors.

    Source: the flow primitive of SynFlow, Tanaka et al. 2020 (arXiv:2006.05467), with p = 1;
    p = 2 is Gebhart et al. 2021 (arXiv:2006.12289), p = 0 counts paths.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
        >>> path_forward(w, torch.ones(3))
        tensor([3.5000, 4.0000])
    """
    check_weight("path_forward", weight, power, mask)
    check_map("path_forward", "x", x, weight.shape[-1], weight)
    return run("path_forward", weight, x, power, mask, differentiable=True)
