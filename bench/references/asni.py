"""The end of an ASNI epoch in plain PyTorch: threshold of all |w| together, masks, zeros."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def magnitudes(weights: Sequence[Tensor]) -> Tensor:
    """|w| of all layers, one after the other: `[N]`."""
    return torch.cat([weight.detach().abs().flatten() for weight in weights])


def threshold(flat: Tensor, removed: int) -> Tensor:
    """The smallest |w| that stays when `removed` go, for 0 <= removed < N.

    >>> threshold(torch.tensor([3.0, 1.0, 2.0]), 1).item()
    2.0
    """
    return torch.kthvalue(flat, removed + 1).values


def masks(weights: Sequence[Tensor], removed: int) -> list[Tensor]:
    """m = 1[|w| >= tau], in the dtype of the weights."""
    tau = threshold(magnitudes(weights), removed)
    return [(weight.detach().abs() >= tau).to(weight.dtype) for weight in weights]


def epoch_end(weights: Sequence[Tensor], removed: int) -> list[Tensor]:
    """The masks, and w <- w * m in place."""
    found = masks(weights, removed)
    for weight, mask in zip(weights, found, strict=True):
        weight.detach().mul_(mask)
    return found
