"""Magnitude and random pruning: one score tensor a layer, one global selection."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bench.references.layers import prunable_layers
from bench.references.selection import Masks, Scores, removal_count, select_global


def _weights(model: nn.Module) -> Scores:
    return {
        name: cast(Tensor, layer.weight).detach() for name, layer in prunable_layers(model).items()
    }


def _select(scores: Scores, sparsity: float, scope: str, selection: str) -> Masks:
    if scope == "global":
        removed = removal_count(sum(score.numel() for score in scores.values()), sparsity)
        return select_global(scores, removed, selection)
    if scope == "local":
        masks: Masks = {}
        for name, score in scores.items():
            removed = removal_count(score.numel(), sparsity)
            masks |= select_global({name: score}, removed, selection)
        return masks
    raise ValueError(f"scope must be 'global' or 'local', got {scope!r}")


def magnitude(
    model: nn.Module, sparsity: float, *, scope: str = "global", selection: str = "exact"
) -> Masks:
    """Return name -> bool mask that keeps the largest `|w|`; scores are |w|, one round."""
    scores = {name: weight.abs() for name, weight in _weights(model).items()}
    return _select(scores, sparsity, scope, selection)


def random(model: nn.Module, sparsity: float, *, scope: str = "global", seed: int = 0) -> Masks:
    """Return name -> bool mask of exactly the wanted size, by scores ~ N(0, 1) from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.randn(weight.shape, generator=generator)
        for name, weight in _weights(model).items()
    }
    return _select(scores, sparsity, scope, "exact")
