"""How much to prune: the checks and the rounding of torch's pruning, under its names.

The names begin with an underscore there, and pruning methods that people write call them.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor


def _validate_pruning_amount_init(amount: Any) -> None:
    """Refuse what is no amount, before there is a tensor.

    Raises:
        TypeError: not a number.
        ValueError: a fraction outside [0, 1], or a negative count.
    """
    if not isinstance(amount, numbers.Real):
        raise TypeError(f"amount: must be an int or a float, got {amount!r}")
    highest = float("inf") if isinstance(amount, numbers.Integral) else 1.0
    if float(amount) < 0 or float(amount) > highest:
        raise ValueError(f"amount: must be a fraction in [0, 1] or a count >= 0, got {amount!r}")


def _validate_pruning_amount(amount: Any, tensor_size: int) -> None:
    """Refuse to prune more than there is.

    Raises:
        ValueError: a count above `tensor_size`.
    """
    if isinstance(amount, numbers.Integral) and int(amount) > tensor_size:
        raise ValueError(f"amount: must be at most {tensor_size}, what is left, got {amount!r}")


def _compute_nparams_toprune(amount: Any, tensor_size: int) -> int:
    """The count itself, or the fraction of `tensor_size`, rounded half to even.

    >>> _compute_nparams_toprune(0.5, 5), _compute_nparams_toprune(3, 5)
    (2, 3)
    """
    return int(amount) if isinstance(amount, numbers.Integral) else round(amount * tensor_size)


def _validate_structured_pruning(t: Tensor) -> None:
    """Refuse a tensor without channels.

    Raises:
        ValueError: fewer than two dimensions.
    """
    if t.dim() <= 1:
        raise ValueError(
            f"structured pruning needs a tensor of 2 or more dimensions, got shape {list(t.shape)}"
        )


def _validate_pruning_dim(t: Tensor, dim: int) -> None:
    """Refuse a dimension that the tensor does not have.

    Raises:
        IndexError: naming the range.
    """
    if not -t.dim() <= dim < t.dim():
        raise IndexError(f"dim: must be in [{-t.dim()}, {t.dim() - 1}], got {dim}")


def _compute_norm(t: Tensor, n: Any, dim: int) -> Tensor:
    """`[channels]`: `torch.norm(t, p=n)` over all dimensions but `dim`."""
    others = [d for d in range(t.dim()) if d != dim % t.dim()]
    return torch.norm(t, p=n, dim=others)


def removed_of(amount: Any, total: int) -> int:
    """How many of `total` to remove, checked."""
    count = _compute_nparams_toprune(amount, total)
    _validate_pruning_amount(count, total)
    return count
