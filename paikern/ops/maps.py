"""Passes over the maps between two weight steps, each one call.

A map has the size of an activation; a network of small layers makes these passes dozens of times
a step, so that what they cost is the call. They are used by `paikern.pathgraph` and are no part
of the torch library: nothing differentiates or compiles through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern.backends import registry


def _run(operation: str, t: Tensor, *args: Any) -> Any:
    function = registry.resolve(operation, t.device.type, t.dtype == torch.float64)
    return function(t, *args)


def map_maximum(t: Tensor) -> float:
    """`t.max()` as a float, 0 for an empty map, NaN if there is one.

    Example:
        >>> import torch
        >>> map_maximum(torch.tensor([1.0, 3.0, 2.0]))
        3.0
    """
    return _run("map_maximum", t if t.is_contiguous() else t.contiguous())


def map_scale(t: Tensor, by: int, *, floor: float = 0.0) -> Tensor:
    """`t * 2**by`, exact but for underflow; with a floor, positive values do not sink below it.

    Args:
        t: a map; written in place where it is contiguous.

    Example:
        >>> import torch
        >>> map_scale(torch.tensor([1.0, 3.0]), -1)
        tensor([0.5000, 1.5000])
    """
    return _run("map_scale_", t if t.is_contiguous() else t.contiguous(), by, floor)


def live_nodes(y: Tensor, g: Tensor, dim: int) -> Tensor:
    """uint8 per unit along `dim`: somewhere a path arrives (y > 0) and leaves (g != 0).

    Args:
        y, g: incoming and outgoing paths of a layer's output, same shape; `dim` is 1 for a
            convolution `[batch, units, *size]` and -1 for a linear layer `[*batch, units]`.

    Source: DPaI poster, effective nodes.

    Example:
        >>> import torch
        >>> live_nodes(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), -1)
        tensor([1, 0], dtype=torch.uint8)
    """
    return _run("live_nodes", y, g, dim)


def through_maximum(g: Tensor, x: Tensor, maximum: float) -> Tensor:
    """Derivative of `log(max) + f(x / max)` by the undivided map.

    Args:
        g: df/dx at the divided map; written in place where it is contiguous.
        x: the divided map, its maximum 1. Ties at the maximum share, as in `torch.max()`.
        maximum: what the map was divided by.

    Example:
        >>> import torch
        >>> through_maximum(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.5]), 2.0)
        tensor([0.3750, 0.2500])
    """
    return _run("through_maximum_", g if g.is_contiguous() else g.contiguous(), x, maximum)
