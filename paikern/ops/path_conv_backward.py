"""path_conv_backward: the adjoint of path_conv_forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paikern.ops._library import autograd, define, fake
from paikern.ops._path import (
    check_conv_map,
    check_weight,
    conv_size,
    result_dtype,
    run,
    save,
    slope,
)

define(
    "path_conv_backward(Tensor weight, Tensor g, SymInt[] input_size, int[] stride, int[] padding, "
    "int[] dilation, int groups, int power, Tensor? mask) -> Tensor"
)


@fake("path_conv_backward")
def _shape(
    weight: Tensor,
    g: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    return g.new_empty(tuple(input_size), dtype=result_dtype(weight, power, g))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, g, _, *geometry, power, mask = inputs
    save(ctx, weight, g, power, mask)
    ctx.geometry = geometry


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, g, mask = ctx.saved_tensors
    ops = torch.ops.paikern
    by_weight = by_g = None
    if ctx.needs_input_grad[0] and ctx.power:
        q = ops.path_conv_score(weight, grad, g, *ctx.geometry, 0, mask, 0.0)
        by_weight = slope(weight, ctx.power, q)
    if ctx.needs_input_grad[1]:
        by_g = ops.path_conv_forward(weight, grad, *ctx.geometry, ctx.power, mask)
        by_g = by_g.to(ctx.source_dtype)
    return by_weight, by_g, None, None, None, None, None, None, None


autograd("path_conv_backward", _derivative, _setup)


def path_conv_backward(
    weight: Tensor,
    g: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    power: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """`torch.nn.grad.conv_input(input_size, weight.abs()**power * unpack_mask(mask), g, ...)`.

    Args:
        weight: as in `path_conv_forward`.
        g: `[batch, out, *size']`, any float dtype, finite.
        input_size: `[batch, in, *size]`, the input whose convolution has the shape of g.
        stride, padding, dilation, groups, power, mask: as in `path_conv_forward`.

    Returns:
        A tensor of `input_size`, float32 (float64 where g or the weight is). Positions of one
        stride phase add the same weights in the same order. Differentiable in g and weight.
        This is also the forward pass of a transposed convolution, whose weight
        `[in, out / groups, *kernel]` is read as that of the convolution it is the adjoint of.

    Raises:
        ValueError: shapes that do not fit, another power. TypeError: not float tensors.

    Example:
        >>> import torch
        >>> w = torch.tensor([[[1.0, -2.0]]])
        >>> path_conv_backward(w, torch.ones(1, 1, 4), [1, 1, 3], [1], [1], [1], 1)
        tensor([[[3., 3., 3.]]])
    """
    name = "path_conv_backward"
    check_weight(name, weight, power, mask)
    size = conv_size(name, weight, input_size, stride, padding, dilation, groups)
    check_conv_map(name, "g", g, size)
    return run(
        "path_conv_backward",
        weight,
        g,
        input_size,
        stride,
        padding,
        dilation,
        groups,
        power,
        mask,
        differentiable=True,
    )
