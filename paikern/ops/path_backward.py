"""path_backward: the adjoint of path_forward, (|W|**p)^T g."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern.ops._library import autograd, define, fake
from paikern.ops._path import check_map, check_weight, result_dtype, run, save, slope

define("path_backward(Tensor weight, Tensor g, int power, Tensor? mask) -> Tensor")


@fake("path_backward")
def _shape(weight: Tensor, g: Tensor, power: int, mask: Tensor | None) -> Tensor:
    dtype = result_dtype(weight, power, g)
    return g.new_empty((*g.shape[:-1], weight.shape[1]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, g, power, mask = inputs
    save(ctx, weight, g, power, mask)


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, g, mask = ctx.saved_tensors
    ops = torch.ops.paikern
    by_weight = by_g = None
    if ctx.needs_input_grad[0] and ctx.power:
        by_weight = slope(weight, ctx.power, ops.path_score(weight, grad, g, 0, mask, 0.0))
    if ctx.needs_input_grad[1]:
        by_g = ops.path_forward(weight, grad, ctx.power, mask).to(ctx.source_dtype)
    return by_weight, by_g, None, None


autograd("path_backward", _derivative, _setup)


def path_backward(
    weight: Tensor, g: Tensor, *, power: int = 1, mask: Tensor | None = None
) -> Tensor:
    """`g @ (weight.abs()**power * unpack_mask(mask))`, without the product in memory.

    Args:
        weight, power, mask: as in `path_forward`.
        g: `[out]` or `[batch, out]`, any float dtype, finite.

    Returns:
        `[in]` or `[batch, in]`, float32 (float64 where g or the weight is). Row ranges are fixed
        and their partial sums added in order: the same bits for every number of threads.
        Differentiable in g and weight.

    Raises:
        ValueError: shapes that do not fit, another power. TypeError: not float tensors.

    Source: as `path_forward`; also the forward pass of a weight stored as `[in, out]`.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
        >>> path_backward(w, torch.tensor([1.0, 2.0]))
        tensor([1.0000, 8.0000, 2.5000])
    """
    check_weight("path_backward", weight, power, mask)
    check_map("path_backward", "g", g, weight.shape[0] if weight.dim() else 0, weight)
    return run("path_backward", weight, g, power, mask, differentiable=True)
