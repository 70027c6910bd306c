"""Whether packing pays for a layer: the cost tables, asked with what the layer computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paikern.backends import masked_cost
from paikern.backends.masked_conv_cost import estimate_conv
from paikern.backends.masked_cost import Estimate
from paikern.sparse.layers import Place, matrix
from paikern.sparse.masked_conv2d import MaskedConv2d

NO_MAPS = "the size of its maps decides: give example_inputs"


def estimate(
    layer: nn.Module,
    kept: int,
    like: Tensor,
    shape: tuple[int, ...] | None,
    batch: int,
    *,
    training: bool,
) -> Estimate:
    """What the layer costs, packed and dense.

    Args:
        layer: one that can be packed or is.
        kept: weights that it keeps.
        like: a tensor of the dtype and device of the weight.
        shape: of its x, if that is known; a convolution needs it.
        batch: else the rows of x of a linear layer.
        training: both gradients count too.
    """
    if isinstance(layer, (nn.Conv2d, MaskedConv2d)):
        return _convolution(layer, kept, like, shape, training)
    rows, columns = matrix(layer)
    batch = _rows_of_x(shape, batch)
    return masked_cost.estimate(
        like.device.type, rows, columns, kept, batch, dtype=like.dtype, training=training
    )


def _convolution(
    layer: nn.Conv2d | MaskedConv2d,
    kept: int,
    like: Tensor,
    shape: tuple[int, ...] | None,
    training: bool,
) -> Estimate:
    if shape is None or len(shape) < 3:
        return Estimate("dense", None, None, NO_MAPS)
    kernel, dilation, padding = layer.kernel_size, layer.dilation, layer.padding
    high, wide = shape[-2:]
    if padding == "same":  # all of it around the map
        high, wide = high + dilation[0] * (kernel[0] - 1), wide + dilation[1] * (kernel[1] - 1)
    around = (0, 0) if isinstance(padding, str) else (padding[0], padding[1])
    return estimate_conv(
        like.device.type,
        layer.out_channels,
        layer.in_channels,
        kernel,
        (high, wide),
        kept,
        torch.Size(shape[:-3]).numel(),
        stride=layer.stride,
        padding=around,
        dilation=dilation,
        groups=layer.groups,
        dtype=like.dtype,
        training=training,
    )


def loss(
    place: Place,
    kept: int,
    shapes: dict[int, tuple[int, ...]],
    batch: int,
    *,
    training: bool,
) -> str:
    """Why the dense weight is faster than a packed one; empty if it is not.

    A weight that several layers use is packed if that pays for one of them.
    """
    found = [
        estimate(owner, kept, place.parameter, shapes.get(id(owner)), batch, training=training)
        for owner in place.owners
    ]
    return found[0].why if all(entry.kernel == "dense" for entry in found) else ""


def packed(
    layer: nn.Module,
    kept: int,
    like: Tensor,
    found: Estimate,
    shape: tuple[int, ...] | None,
    batch: int,
    *,
    bits: bool,
    training: bool,
) -> tuple[str, float | None]:
    """Kernel and seconds of a layer that is packed, with `bits` for positions or columns, also
    where dense would be faster.

    A convolution that is packed and slower so runs dense, on the weight made dense for the call. On
    a GPU the backend chooses call by call, and no figure has been measured.
    """
    if like.device.type not in ("cpu", "meta"):
        return "backend", None
    if found.why == NO_MAPS:
        return "unknown", None
    if found.seconds is None or isinstance(layer, MaskedConv2d):
        return found.kernel, found.seconds
    rows, columns = matrix(layer)
    batch = _rows_of_x(shape, batch)
    return masked_cost.packed(rows, columns, kept, batch, bits=bits, training=training)


def _rows_of_x(shape: tuple[int, ...] | None, batch: int) -> int:
    return batch if shape is None else torch.Size(shape[:-1]).numel()
