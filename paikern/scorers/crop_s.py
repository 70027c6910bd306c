"""CroP-S and CroPit-S: keep the channels that carry the gradient flow, in either direction.

    g = sum_b dL_b / dW * m,   z(c) = sum_b <g, dL_b / dW>,   S[o] = |dz / dc[o]|   at c = 1

c[o] is the gate of output o. Without any gate in the model, by the chain rule,

    S[o] = |sum_{i,u,v} (W * (H g) + g * g)[o] + b[o] * (H g)_b[o]|

with the Hessian over weights and biases and g held at 0 for biases. `gates="slides"` takes both
derivatives by the gates instead: S = |H_cc g_c|.

Source: Rachwan et al. 2022 (arXiv:2206.10451), section 4. Their code has the first form, which the
published tables come from; the formula on their slides is the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from paikern.gradients import make_loss
from paikern.gradients.gates import GateNetwork
from paikern.pathgraph.channels import ChannelGroups
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.channel_scorer import spread_over, summed
from paikern.scorers.gated_scorer import GatedScorer, biases_of

GATES = ("weights", "slides")


@register_scorer("crop_s")
class CroPS(GatedScorer):
    """`|d<g, dL/dW> / dc|` of each output in one round; coupled layers add up.

    Args:
        gates: "weights" differentiates by the weights, then by the gates, as the authors' code
            does; "slides" twice by the gates.
        batches, batch_size, target: as in `snap`; the authors read 5 batches.
        mode: "eval" as published.

    Attention runs on PyTorch's plain path, the only one with a second derivative.

    Raises:
        PaikernError: an operation has no second derivative.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> masks = pk.prune(net, "crop_s", sparsity=0.5, data=(x, torch.arange(8) % 4))
        >>> masks.node_sparsity, masks.kept
        (0.5, 96)
    """

    mode: str = "eval"
    gates: str = "weights"

    summary: ClassVar[str] = "gradient flow through channels |d<g, dL/dW> / dgate|; structured"
    source: ClassVar[str] = "Rachwan et al. 2022, section 4"
    cost: ClassVar[str] = "about 9F"
    weakness: ClassVar[str] = (
        "needs a second derivative; as little as one channel is left of a layer"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gates not in GATES:
            raise ValueError(f"gates must be one of {GATES}, got {self.gates!r}")

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        slopes = self._by_gates(run, groups) if self.gates == "slides" else self._mixed(run, groups)
        found = {name: slope.abs() for name, slope in slopes.items()}
        return {group.name: summed(group, found) for group in groups}

    def _mixed(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        gates = self.gated(run, groups)
        network, slopes = gates.network, gates.zeros()
        with network.running():
            batches = self.read(run)
            gradients = network.gradients(batches)
            network.mask_(gradients)
            for bias in gates.biases.values():
                gradients[bias].zero_()
            for name in gates.names:  # before the product, which empties `gradients`
                squares = gates.rows(name, gradients[name].square())
                slopes[name] += squares.sum(1, dtype=torch.float64)
            products = network.hessian_product(gradients, batches)
        for name in gates.names:
            slopes[name] += gates.by_gate(name, products[name])
            if name in gates.biases:
                slopes[name] += gates.by_gate(gates.biases[name], products[gates.biases[name]])
        return slopes

    def _by_gates(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        names = [name for group in groups for name in group.rows]
        biases = biases_of(run, names)
        state = {bias: run.model.get_parameter(bias).detach() for bias in biases.values()}

        def values(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
            made = {}
            for name, gate in gates.items():
                weight = network.masked[name]
                made[name] = weight * spread_over(gate, weight, *run.layers[name].layout)
                if name in biases:
                    made[biases[name]] = state[biases[name]] * gate
            return made

        sizes = {name: len(rows) for group in groups for name, rows in group.rows.items()}
        ones = {name: run.weight(name).new_ones(size) for name, size in sizes.items()}
        network = GateNetwork(run, make_loss(run.loss_fn), self.mode, ones, values)
        with network.running():
            batches = self.read(run)
            return network.hessian_product(network.gradients(batches), batches)


@register_scorer("cropit_s")
class CroPitS(CroPS):
    """CroP-S in rounds, schedule "halving": half the channels go at once, then half of the rest.

    Options as in `crop_s`; channels that are gone stay so.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 100, 4), seed=0), torch.eye(8)
        >>> masks = pk.prune(net, "cropit_s", sparsity=0.9, data=(x, torch.arange(8) % 4))
        >>> [round(1 - row["density"], 2) for row in masks.metadata["history"]]
        [0.5, 0.7, 0.8, 0.85, 0.87, 0.88, 0.9]
    """

    summary: ClassVar[str] = "CroP-S in seven rounds that halve the distance to the sparsity"
    cost: ClassVar[str] = "about 9F a round"
    default_rounds: ClassVar[int] = 7
    default_schedule: ClassVar[str] = "halving"
