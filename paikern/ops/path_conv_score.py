"""path_conv_score: the score of every weight of a convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paikern.ops._library import define, fake
from paikern.ops._path import (
    check_conv_map,
    check_float,
    check_weight,
    conv_size,
    result_dtype,
    run,
)

define(
    "path_conv_score(Tensor weight, Tensor x, Tensor g, int[] stride, int[] padding, "
    "int[] dilation, int groups, int power, Tensor? mask, float pruned) -> Tensor"
)


@fake("path_conv_score")
def _shape(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
    pruned: float,
) -> Tensor:
    return x.new_empty(weight.shape, dtype=result_dtype(weight, power, x, g))


def path_conv_score(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    power: int = 1,
    mask: Tensor | None = None,
    pruned: float = 0.0,
) -> Tensor:
    """`weight.abs()**power * torch.nn.grad.conv_weight(x, weight.shape, g, ...)`, `pruned` where 0.

    Args:
        weight: as in `path_conv_forward`.
        x: `[batch, in, *size]`, paths that come in. g: `[batch, out, *size']`, paths that go out.
        stride, padding, dilation, groups, power, mask: as in `path_conv_forward`.
        pruned: the score where the mask has a 0 bit.

    Returns:
        float32 of the weight's shape (float64 where a tensor that is read is). Not differentiable.

    Raises:
        ValueError: shapes that do not fit, another power. TypeError: not float tensors.

    Source: the flow primitive with its score, batch-1 weight gradient of two small maps.

    Example:
        >>> import torch
        >>> w = torch.tensor([[[1.0, -2.0]]])
        >>> path_conv_score(w, torch.ones(1, 1, 3), torch.ones(1, 1, 4), [1], [1], [1], 1)
        tensor([[[3., 6.]]])
    """
    name = "path_conv_score"
    check_weight(name, weight, power, mask)
    size = conv_size(name, weight, x.shape, stride, padding, dilation, groups)
    check_float(name, "x", x)
    check_conv_map(name, "g", g, size)
    return run(
        "path_conv_score",
        weight,
        x,
        g,
        stride,
        padding,
        dilation,
        groups,
        power,
        mask,
        pruned,
    )
