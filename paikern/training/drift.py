"""How far weights have moved from a reference: one pass, sums in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Two pieces of this many floats and their difference stay in a cache of 1 MB.
_PIECE = 1 << 16


def squared_distance(now: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """`sum((now - reference)**2)` over all tensors of `reference`; differences as they are stored.

    Example:
        >>> import torch
        >>> squared_distance({"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 4.0])})
        25.0
    """
    total = 0.0
    for name, was in reference.items():
        tensor = now[name].detach()
        a, b = tensor.reshape(-1), was.to(tensor.device).reshape(-1)
        step = _PIECE if a.device.type == "cpu" else max(1, a.numel())
        parts = [
            torch.linalg.vector_norm(x - y, dtype=torch.float64).square()
            for x, y in zip(a.split(step), b.split(step), strict=True)
        ]
        if parts:
            total += float(torch.stack(parts).sum())
    return total


def squared_norm(tensors: Mapping[str, Tensor]) -> float:
    """`sum(w**2)` over all tensors, in float64."""
    return sum(
        float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64).square())
        for t in tensors.values()
        if t.numel()
    )
