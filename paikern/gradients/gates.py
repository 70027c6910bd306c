"""A model as a function of gates, numbers that multiply the outputs of its layers or its norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paikern.batches import Batch
from paikern.gradients.loss import Loss
from paikern.gradients.network import Network

if TYPE_CHECKING:
    from paikern.scorers.base import Run

Values = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Gates by name -> the parameters that the model computes with, by name."""


class GateNetwork(Network):
    """The model under `run.masks`, differentiated by `gates` instead of its weights.

    Args:
        run, loss, mode: as in `Network`.
        gates: name -> the gates' values; the names are the caller's.
        values: what the gates make of the model's parameters; the masked weights are its own, where
            it says nothing of them.
    """

    def __init__(
        self, run: Run, loss: Loss, mode: str, gates: Mapping[str, Tensor], values: Values
    ) -> None:
        super().__init__(run, loss, mode)
        self.masked = {name: weight.detach() for name, weight in self.weights.items()}
        self._values = values
        self._parameters = {}  # nothing is put into the model: what it computes with are products
        with torch.inference_mode(False):
            self.weights = {name: gate.clone().requires_grad_() for name, gate in gates.items()}

    def outputs(self, batch: Batch, weights: Mapping[str, Tensor] | None = None) -> Any:
        """What the model returns for a batch under `weights`, other values of the gates."""
        gates = self.weights if weights is None else weights
        return super().outputs(batch, {**self.masked, **self._values(gates)})
