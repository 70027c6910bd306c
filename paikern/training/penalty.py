"""An L1 penalty on the weights of batch norms, whatever loss the training loop has."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class NormPenalty:
    """Adds `strength * sign(gamma)`, a subgradient of `strength * |gamma|`, before every step.

    Args:
        model: whose batch norms are meant.
        optimizers: each adds it to what it holds. Before the first `hold` and after `let_go`
            nothing is added.
        strength: 0 for none.

    Raises:
        ValueError: strength below 0 or not finite, or above 0 without an optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizers: tuple[torch.optim.Optimizer, ...], strength: float
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"penalty must be >= 0, got {strength}")
        if strength and not optimizers:
            raise ValueError(
                "penalty is added to the gradients before each step of the optimizer; pass "
                "optimizer=, or penalty=0"
            )
        self.model, self.optimizers, self.strength = model, optimizers, strength
        self._hooks: list[Any] = []

    def hold(self) -> None:
        """From now on."""
        self.let_go()
        if self.strength:
            self._hooks = [o.register_step_pre_hook(self._add) for o in self.optimizers]

    def let_go(self) -> None:
        """No more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _add(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for scale in batch_norm_scales(self.model).values():
            if scale.grad is not None and id(scale) in held:
                scale.grad.add_(torch.sign(scale.detach()), alpha=self.strength)


def batch_norm_scales(model: nn.Module) -> dict[str, Tensor]:
    """gamma of every batch norm that has one, by the name of the module."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.weight is not None
    }
