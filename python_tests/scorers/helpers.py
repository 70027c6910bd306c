"""Masks compared with masks, and long float64 runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import paikern as pk
from python_tests.oracles import prunable
from python_tests.oracles.synflow import flow_scores, kept_by_round

Masks = Mapping[str, Tensor]


def agreement(found: Masks, expected: Masks) -> float:
    """Fraction of all weights whose bit is the same."""
    assert list(found) == list(expected)
    equal = sum(int((found[n] == expected[n]).sum()) for n in found)
    return equal / sum(m.numel() for m in expected.values())


def kept_agreement(found: Masks, expected: Masks) -> float:
    """Fraction of the weights kept by `expected` that `found` keeps; both keep as many."""
    assert list(found) == list(expected)
    both = sum(int((found[n] & expected[n]).sum()) for n in found)
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in (found, expected)]
    assert kept[0] == kept[1]
    return both / kept[1]


def counts(masks: Masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def largest_count_difference(found: Masks, expected: Masks) -> float:
    """Largest difference of a layer's count, as a fraction of all that are kept."""
    a, b = counts(found), counts(expected)
    return max(abs(a[n] - b[n]) for n in b) / sum(b.values())


def empty(masks: Masks) -> list[str]:
    return [name for name, kept in counts(masks).items() if kept == 0]


def log_paths(model: nn.Module, masks: Masks, x: Tensor) -> float:
    return pk.analyze(model, pk.MaskSet.from_bool(dict(masks)), example_inputs=x).log_paths


def synflow_float64(model: nn.Module, x: Tensor, sparsity: float, rounds: int) -> dict[str, Tensor]:
    """SynFlow by float64 autograd with a selection fast enough for 25 million weights.

    Exactly the count of every round: above the k-th largest score, then ties by lower index.
    """
    masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, (_, p) in prunable(model).items()}
    total = sum(mask.numel() for mask in masks.values())
    for keep in kept_by_round(total, sparsity, rounds, "exponential"):
        _, scores = flow_scores(model, x, masks)
        flat = torch.cat([torch.where(masks[n], s, -1.0).flatten() for n, s in scores.items()])
        threshold = flat.kthvalue(total - keep + 1).values
        kept = flat > threshold
        ties = torch.nonzero(flat == threshold).flatten()
        kept[ties[: keep - int(kept.sum())]] = True
        parts = kept.split([s.numel() for s in scores.values()])
        masks = {n: part.view(s.shape) for (n, s), part in zip(scores.items(), parts, strict=True)}
    return masks
