"""path_conv_forward: weighted paths through a convolution, conv(x, |W|**p)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paikern.ops._library import autograd, define, fake
from paikern.ops._path import (
    check_float,
    check_weight,
    conv_shape,
    conv_size,
    result_dtype,
    run,
    save,
    slope,
)

define(
    "path_conv_forward(Tensor weight, Tensor x, int[] stride, int[] padding, int[] dilation, "
    "int groups, int power, Tensor? mask) -> Tensor"
)


@fake("path_conv_forward")
def _shape(
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    shapes = tuple(weight.shape), tuple(x.shape)
    size = conv_shape("path_conv_forward", *shapes, stride, padding, dilation, groups)
    return x.new_empty(size, dtype=result_dtype(weight, power, x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, x, *geometry, power, mask = inputs
    save(ctx, weight, x, power, mask)
    ctx.geometry = geometry


def _derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, x, mask = ctx.saved_tensors
    ops = torch.ops.paikern
    by_weight = by_x = None
    if ctx.needs_input_grad[0] and ctx.power:
        q = ops.path_conv_score(weight, x, grad, *ctx.geometry, 0, mask, 0.0)
        by_weight = slope(weight, ctx.power, q)
    if ctx.needs_input_grad[1]:
        size = list(x.shape)
        by_x = ops.path_conv_backward(weight, grad, size, *ctx.geometry, ctx.power, mask)
        by_x = by_x.to(ctx.source_dtype)
    return by_weight, by_x, None, None, None, None, None, None


autograd("path_conv_forward", _derivative, _setup)


def path_conv_forward(
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    power: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """`conv(x, weight.abs()**power * unpack_mask(mask), None, stride, padding, dilation, groups)`.

    Args:
        weight: `[out, in / groups, *kernel]` with 1 to 3 kernel axes, otherwise as in
            `path_forward`.
        x: `[batch, in, *size]`, any float dtype, finite.
        stride, padding, dilation: one integer an axis.
        groups, power, mask: as in torch's convolution and in `path_forward`.

    Returns:
        `[batch, out, *size']`, float32 (float64 where x or the weight is). Every position adds the
        same weights in the same order, so positions that see equal values are equal bit for bit
        (a max-pool behind it meets exact ties), for every number of threads. Differentiable in x
        and weight.

    Raises:
        ValueError: shapes that do not fit, another power. TypeError: not float tensors.

    Source: DPaI's incoming paths (power 0), SynFlow (power 1), Gebhart et al. 2021 (power 2).

    Example:
        >>> import torch
        >>> w = torch.tensor([[[1.0, -2.0]]])
        >>> path_conv_forward(w, torch.ones(1, 1, 3), [1], [1], [1], 1)
        tensor([[[2., 3., 3., 1.]]])
    """
    name = "path_conv_forward"
    check_weight(name, weight, power, mask)
    conv_size(name, weight, x.shape, stride, padding, dilation, groups)
    check_float(name, "x", x)
    return run(
        "path_conv_forward",
        weight,
        x,
        stride,
        padding,
        dilation,
        groups,
        power,
        mask,
        differentiable=True,
    )
