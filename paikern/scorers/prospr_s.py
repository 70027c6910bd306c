"""ProsPr for channels: keep those that matter for the loss after the first steps of training.

    w_0 = c * w,  b_0 = c * b,   then M steps of SGD as in `prospr`
    S[o] = |dL_M / dc[o]| = |sum_{i,u,v} (w dL_M / dw_0)[o] + b[o] * (dL_M / db_0)[o]|   at c = 1

c[o], the gate of output o, multiplies its weights and its bias before the first step; the steps
move the products. The derivatives by weights and biases are those of `prospr`, so that no gate has
to be put into the model.

Source: ProsPr, Alizadeh et al. 2022 (arXiv:2202.08132), section 3, with a mask a channel in place
of one a weight, as in their structured experiments.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from paikern.pathgraph.channels import ChannelGroups
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.channel_scorer import ChannelScorer, summed
from paikern.scorers.gated_scorer import GatedScorer
from paikern.scorers.prospr import ProsPr
from paikern.scores import Scores


@register_scorer("prospr_s")
class ProsPrS(ProsPr, GatedScorer):
    """`|dL_M / dc|` of each output through M steps of SGD; coupled layers add up. One round.

    The outputs of the model are never among the channels, so the classifier keeps all of its own.

    Args:
        steps, lr, momentum, order, batches, batch_size: as in `prospr`.
        mode: "train" as published. A train-mode batch norm divides a gate before it out of one
            loss, but not out of the steps: they go further where the weights are smaller, and the
            score of such a channel is of the order of `lr`.
        target: what `sparsity` is a fraction of, "nodes" (outputs of layers) or "weights".

    Raises:
        PaikernError: with order "full", an operation has no second derivative.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> data = (x, torch.arange(8) % 4)
        >>> masks = pk.prune(net, "prospr_s", sparsity=0.5, data=data, batches=1)
        >>> masks.node_sparsity, masks.kept
        (0.5, 96)
    """

    summary: ClassVar[str] = "channel sensitivity of the loss after M steps of SGD; structured"
    source: ClassVar[str] = "Alizadeh et al. 2022, section 3"
    cost: ClassVar[str] = "(12 steps + 3) F of one batch"
    weakness: ClassVar[str] = (
        "needs a second derivative and a small lr; as little as one channel is left of a layer"
    )
    variants: ClassVar[tuple[str, ...]] = ("paper",)

    def score(self, run: Run) -> Scores:
        return ChannelScorer.score(self, run)

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        gates = self.gated(run, groups)
        found = self.through_steps(run, gates.network)
        slopes = gates.zeros()
        for name in gates.names:
            slopes[name] += gates.by_gate(name, found[name])
            if name in gates.biases:
                slopes[name] += gates.by_gate(gates.biases[name], found[gates.biases[name]])
        return {
            group.name: summed(group, {n: slopes[n].abs() for n in group.rows}) for group in groups
        }
