"""What the methods that differentiate by channels have in common.

A gate c[o], 1 for every output of a layer, multiplies it, bias included: c[o] * (conv(A, W)[o] +
b[o]). No gate has to be put into the model: by the chain rule

    dL/dc[o] = sum_{i,u,v} W[o,i,u,v] * dL/dW[o,i,u,v] + b[o] * dL/db[o]

so the gradients of weights and biases are enough, and they are added up as they are made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from paikern.gradients import Loss, Network, make_loss
from paikern.pathgraph.channels import ChannelGroups
from paikern.scorers.base import Run
from paikern.scorers.channel_scorer import ChannelScorer, by_output
from paikern.scorers.gradient_scorer import GradientScorer


@dataclass
class GatedScorer(GradientScorer, ChannelScorer):
    """A channel scorer that differentiates `loss_fn` on `data`.

    Args:
        batches, batch_size, mode: as in `GradientScorer`.
        target: as in `ChannelScorer`.
    """

    def __post_init__(self) -> None:
        GradientScorer.__post_init__(self)
        ChannelScorer.__post_init__(self)

    def gated(self, run: Run, groups: ChannelGroups) -> Gates:
        return Gates(run, groups, make_loss(run.loss_fn), self.mode)


class Gates:
    """The network of a run with the biases of its channels among what is differentiated.

    `names` are the weights whose outputs are ranked; `biases` maps such a weight to the name of its
    layer's bias, where it has one.
    """

    def __init__(self, run: Run, groups: ChannelGroups, loss: Loss, mode: str) -> None:
        self.names = [name for group in groups for name in group.rows]
        self.biases = biases_of(run, self.names)
        self.network = Network(run, loss, mode, list(self.biases.values()))
        self._layouts = {name: run.layers[name].layout for name in self.names}
        self._of_bias = {bias: name for name, bias in self.biases.items()}

    def owner(self, parameter: str) -> str | None:
        """The weight whose outputs a parameter belongs to, None where they are not ranked."""
        return parameter if parameter in self._layouts else self._of_bias.get(parameter)

    def by_gate(self, parameter: str, slope: Tensor) -> Tensor:
        """`sum parameter * slope` of each output, float64 `[out]`."""
        held = self.network.weights[parameter].detach()
        if parameter in self._of_bias:
            return held.double() * slope.double()
        return self.rows(parameter, held.to(slope.dtype) * slope).sum(1, dtype=torch.float64)

    def rows(self, name: str, value: Tensor) -> Tensor:
        """A tensor of a weight's shape as `[out, everything else]`."""
        return by_output(value, *self._layouts[name])

    def zeros(self) -> dict[str, Tensor]:
        """Weight -> float64 zeros `[out]`."""
        return {
            name: torch.zeros(
                len(self.rows(name, weight.detach())), dtype=torch.float64, device=weight.device
            )
            for name in self.names
            for weight in (self.network.weights[name],)
        }


def biases_of(run: Run, names: Iterable[str]) -> dict[str, str]:
    """Weight -> its layer's bias, of those that have one."""
    parameters = dict(run.model.named_parameters())
    found = {name: _bias_of(run.layers[name].source) for name in names}
    return {name: bias for name, bias in found.items() if bias in parameters}


def _bias_of(source: str) -> str:
    """The bias of the layer whose weight `named_parameters` calls `source`."""
    inside, parametrized, _ = source.partition("parametrizations.weight")
    return f"{inside if parametrized else source.rpartition('.')[0] + '.'}bias".removeprefix(".")
