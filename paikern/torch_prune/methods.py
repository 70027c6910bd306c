"""The pruning methods of torch, each as a choice of bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from paikern.torch_prune.amounts import _compute_norm, _validate_pruning_amount_init
from paikern.torch_prune.base import BitsMethod
from paikern.torch_prune.buffers import PackedMask, pack
from paikern.torch_prune.select import all_ones, keep_channels, keep_largest, keep_random

__all__ = [
    "CustomFromMask",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "RandomStructured",
    "RandomUnstructured",
]


class Identity(BitsMethod):
    """Prunes nothing, but gives the parameter a mask."""

    PRUNING_TYPE = "unstructured"

    def select_kept(self, t: Tensor, kept: Tensor | None, name: str) -> Tensor:
        return all_ones(t.numel(), t.device) if kept is None else kept

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str
    ) -> torch_prune.BasePruningMethod:
        """See `identity`."""
        return super().apply(module, name)


class RandomUnstructured(BitsMethod):
    """Removes `amount` of the weights that are left, at random.

    Raises:
        TypeError: `amount` is no number. ValueError: a fraction outside [0, 1], a count below 0.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: Any) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount

    def select_kept(self, t: Tensor, kept: Tensor | None, name: str) -> Tensor:
        return keep_random([t], [kept], self.amount)[0]

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: Any
    ) -> torch_prune.BasePruningMethod:
        """See `random_unstructured`."""
        return super().apply(module, name, amount=amount)


class L1Unstructured(BitsMethod):
    """Removes `amount` of the weights that are left, the smallest magnitudes.

    Raises:
        TypeError: `amount` is no number. ValueError: a fraction outside [0, 1], a count below 0.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: Any) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount

    def select_kept(self, t: Tensor, kept: Tensor | None, name: str) -> Tensor:
        return keep_largest([t], [kept], self.amount, [name])[0]

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: Any, importance_scores: Tensor | None = None
    ) -> torch_prune.BasePruningMethod:
        """See `l1_unstructured`."""
        return super().apply(module, name, amount=amount, importance_scores=importance_scores)


class RandomStructured(BitsMethod):
    """Removes `amount` of the channels along `dim` that are left, at random.

    Raises:
        TypeError: `amount` is no number. ValueError: a fraction outside [0, 1], a count below 0.
    """

    PRUNING_TYPE = "structured"

    def __init__(self, amount: Any, dim: int = -1) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount
        self.dim = dim

    def select_kept(self, t: Tensor, kept: Tensor | None, name: str) -> Tensor:
        # Drawn on the CPU for tensors on every device, as torch's pruning does.
        def scores(left: Tensor) -> Tensor:
            return torch.rand(left.shape[self.dim])

        return keep_channels(t, kept, self.amount, self.dim, scores, name)

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, amount: Any, dim: int = -1
    ) -> torch_prune.BasePruningMethod:
        """See `random_structured`."""
        return super().apply(module, name, amount=amount, dim=dim)


class LnStructured(BitsMethod):
    """Removes `amount` of the channels along `dim` that are left, the smallest `n`-norms.

    Raises:
        TypeError: `amount` is no number. ValueError: a fraction outside [0, 1], a count below 0.
    """

    PRUNING_TYPE = "structured"

    def __init__(self, amount: Any, n: Any, dim: int = -1) -> None:
        _validate_pruning_amount_init(amount)
        self.amount = amount
        self.n = n
        self.dim = dim

    def select_kept(self, t: Tensor, kept: Tensor | None, name: str) -> Tensor:
        def scores(left: Tensor) -> Tensor:
            return _compute_norm(left, self.n, self.dim)

        return keep_channels(t, kept, self.amount, self.dim, scores, name)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        amount: Any,
        n: Any,
        dim: int,
        importance_scores: Tensor | None = None,
    ) -> torch_prune.BasePruningMethod:
        """See `ln_structured`."""
        return super().apply(
            module, name, amount=amount, n=n, dim=dim, importance_scores=importance_scores
        )


class CustomFromMask(BitsMethod):
    """Removes what a given mask removes, beside what is removed already.

    Args:
        mask: ones and zeros, of the weight's shape.

    Raises:
        ValueError: values other than 0 and 1. AssertionError: a weight of another shape.
    """

    PRUNING_TYPE = "global"

    def __init__(self, mask: Tensor | PackedMask) -> None:
        if not isinstance(mask, PackedMask):
            mask = PackedMask(pack(mask.detach()), mask.shape, mask.dtype)
        self._held = mask

    @property
    def mask(self) -> Tensor:
        """The mask, made from bits: a new tensor."""
        return self._held.copy().dense()

    def select_kept(self, t: Tensor, kept: Tensor | None, name: str) -> Tensor:
        if self._held.shape != tuple(t.shape):
            raise AssertionError(
                f"mask: {name} has shape {list(t.shape)}, the mask {list(self._held.shape)}"
            )
        bits = self._held.bits.to(t.device)
        return bits if kept is None else bits & kept

    @classmethod
    def apply(  # type: ignore[override]
        cls, module: nn.Module, name: str, mask: Tensor | PackedMask
    ) -> torch_prune.BasePruningMethod:
        """See `custom_from_mask`."""
        return super().apply(module, name, mask=mask)
