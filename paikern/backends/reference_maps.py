"""The passes over the maps between two weight steps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def map_maximum(t: Tensor) -> float:
    return float(t.amax()) if t.numel() else 0.0


def map_scale_(t: Tensor, by: int, floor: float) -> Tensor:
    scaled = t * 2.0**by
    if floor > 0:
        scaled = torch.where(t > 0, scaled.clamp(min=floor), scaled)
    return t.copy_(scaled)


def live_nodes(y: Tensor, g: Tensor, dim: int) -> Tensor:
    on_path = ((y > 0) & (g != 0)).transpose(0, dim)
    return (on_path.flatten(1).any(1) if on_path.dim() > 1 else on_path).to(torch.uint8)


def through_maximum_(g: Tensor, x: Tensor, maximum: float) -> Tensor:
    at_maximum = x == 1.0
    rest = (1.0 - float((g.double() * x.double()).sum())) / max(1, int(at_maximum.sum()))
    return g.add_(at_maximum * rest).div_(maximum)
