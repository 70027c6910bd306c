"""Whether packing pays for a layer: the cost tables, asked with what the layer computes."""

from __future__ import annotations

import torch
from torch import nn

from paikern.backends import masked_cost
from paikern.backends.masked_cost import Estimate
from paikern.sparse.layers import Place, matrix


def estimate(
    layer: nn.Module,
    kept: int,
    like: torch.Tensor,
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
        shape: of its x, if that is known.
        batch: else the rows of x of a linear layer.
        training: both gradients count too.
    """
    rows, columns = matrix(layer)
    batch = _rows_of_x(shape, batch)
    return masked_cost.estimate(
        like.device.type, rows, columns, kept, batch, dtype=like.dtype, training=training
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
    found: Estimate,
    shape: tuple[int, ...] | None,
    batch: int,
    *,
    training: bool,
) -> tuple[str, float | None]:
    """Kernel and seconds of a layer that is packed, also where dense would be faster."""
    if found.kernel != "dense" or found.seconds is None:
        return found.kernel, found.seconds
    rows, columns = matrix(layer)
    batch = _rows_of_x(shape, batch)
    runs = masked_cost.cpu_kernel(rows, columns, kept, batch)
    if runs == "index":
        seconds = masked_cost.index_seconds(rows, columns, kept, batch)
    else:
        seconds = masked_cost.decode_seconds(rows, columns, batch)
    return runs, (3 if training else 1) * seconds


def _rows_of_x(shape: tuple[int, ...] | None, batch: int) -> int:
    return batch if shape is None else torch.Size(shape[:-1]).numel()
