"""What methods that prune during training should find, in plain float64 and sorts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def asni_percent(epoch: int, epochs: int, alpha: float, beta: float, gamma: float) -> float:
    return alpha / (1 + math.exp(-(epoch - beta * epochs) / gamma))


def largest(weights: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The `kept` largest |w| over all layers; ties to the lower position."""
    flat = torch.cat([w.detach().double().abs().flatten() for w in weights.values()])
    order = torch.sort(flat, descending=True, stable=True).indices
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:kept]] = True
    parts = mask.split([w.numel() for w in weights.values()])
    return {n: part.view(w.shape) for (n, w), part in zip(weights.items(), parts, strict=True)}


def means(weight: Tensor) -> tuple[float, float]:
    """Mean of the positive and of the negative entries."""
    values = [float(v) for v in weight.detach().double().flatten()]
    above, below = [v for v in values if v > 0], [v for v in values if v < 0]
    return math.fsum(above) / max(1, len(above)), math.fsum(below) / max(1, len(below))


def imp_counts(total: int, kept: int, fraction: float = 0.2) -> list[int]:
    """Weights of level 0, 1, ... down to `kept`."""
    found = [total]
    while found[-1] > kept:
        removed = math.floor(fraction * found[-1] + 1e-9)
        found.append(max(found[-1] - removed, kept))
    return found


def slides_epoch(distances: list[float], tolerance: float) -> int | None:
    """The epoch (from 1) at which squared relative distances from the start have settled."""
    for t in range(2, len(distances) + 1):
        if abs(distances[t - 1] - distances[t - 2]) / abs(distances[0]) < tolerance:
            return t
    return None


def published_epoch(distances: list[float], margin: float) -> int | None:
    """The same by distances from epoch 1 (the first of them 0) and the change until epoch 2."""
    for t in range(3, len(distances) + 1):
        if abs(distances[t - 1] - distances[t - 2]) < distances[1] * margin:
            return t
    return None


def ticket_epoch(history: list[list[float]], removed: int, window: int, limit: float) -> int | None:
    """The epoch at which the choice of |gamma| agrees with those of the epochs before."""
    marks = []
    for t, gammas in enumerate(history, 1):
        order = sorted(range(len(gammas)), key=lambda i: (-abs(gammas[i]), i))
        marks.append(set(order[: len(gammas) - removed]))
        recent = marks[-window:]
        if len(recent) == window and all(
            len(recent[-1] ^ other) / len(gammas) <= limit for other in recent[:-1]
        ):
            return t
    return None
