"""Keeping the k largest of several score tensors, by the two rules in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Scores = dict[str, Tensor]
Masks = dict[str, Tensor]


def removal_count(total: int, sparsity: float) -> int:
    """Return `floor(sparsity * total)`: how many weights a sparsity removes."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    return math.floor(sparsity * total)


def round_removals(
    total: int, sparsity: float, rounds: int, schedule: str = "exponential"
) -> list[int]:
    """Return how many weights are gone after each round, the last one by `removal_count`.

    Density after round r of T: `d**((r+1)/T)` (exponential) or `1 - (1-d)(r+1)/T` (linear); the
    count of a round in between is `int((1 - density) * total)`.

    >>> round_removals(1024, 0.75, 2)
    [512, 768]
    """
    if rounds < 1:
        raise ValueError(f"round_removals: rounds must be >= 1, got {rounds}")
    if schedule not in ("exponential", "linear"):
        raise ValueError(f"schedule must be 'exponential' or 'linear', got {schedule!r}")
    density = 1.0 - sparsity
    removals = []
    for step in range(1, rounds):
        if schedule == "exponential":
            kept = density ** (step / rounds)
        else:
            kept = 1.0 - (1.0 - density) * step / rounds
        removals.append(int((1.0 - kept) * total))
    return [*removals, removal_count(total, sparsity)]


def select_global(scores: Scores, removed: int, rule: str = "published") -> Masks:
    """Return name -> bool mask after removing `removed` weights over all tensors together.

    `published`: keep what is greater than the `removed`-th smallest score (`torch.kthvalue`), so
    ties at the threshold all go and fewer may stay. `exact`: exactly N - removed stay, the lower
    index first on ties (a full stable sort).
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    if not 0 <= removed <= flat.numel():
        raise ValueError(f"select_global: removed must be in [0, {flat.numel()}], got {removed}")
    if rule == "published":
        kept = torch.ones_like(flat, dtype=torch.bool)
        if removed >= 1:
            kept = flat > torch.kthvalue(flat, removed).values
    elif rule == "exact":
        order = torch.sort(flat, descending=True, stable=True).indices
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[order[: flat.numel() - removed]] = True
    else:
        raise ValueError(f"select_global: rule must be 'published' or 'exact', got {rule!r}")
    parts = kept.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }
