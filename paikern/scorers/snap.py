"""SNAP: keep the channels that the loss is most sensitive to.

    S[o] = |sum_b dL_b / dc[o]|   at c = 1, c[o] the gate of output o

Source: SNAP, Verdenius et al. 2020, "Pruning via iterative ranking of sensitivity statistics"
(arXiv:2006.00896), the structured form of SNIP. Their division by the sum of the losses does not
change the order; their code takes the mean of -logit of the label for the loss
(`loss_fn="nll_logits"`).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from paikern.gradients.network import weighted
from paikern.pathgraph.channels import ChannelGroups
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.channel_scorer import summed
from paikern.scorers.gated_scorer import GatedScorer


@register_scorer("snap")
class SNAP(GatedScorer):
    """`|sum_b dL_b / dc|` of each output; coupled layers add up. One round.

    Args:
        batches, batch_size: as in `GradientScorer`.
        mode: "eval". In "train" a batch norm divides every gate before it out again, and what is
            left of the scores of such layers (1e-6 of the others) is rounding.
        target: what `sparsity` is a fraction of, "nodes" (outputs of layers) or "weights".

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> masks = pk.prune(net, "snap", sparsity=0.5, data=(x, torch.arange(8) % 4))
        >>> masks.node_sparsity, masks.sparsity
        (0.5, 0.5)
    """

    mode: str = "eval"

    summary: ClassVar[str] = "channel sensitivity |dL / dgate| of the loss on data; structured"
    source: ClassVar[str] = "Verdenius et al. 2020"
    cost: ClassVar[str] = "3F"
    weakness: ClassVar[str] = "as little as one channel is left of a layer"

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        gates = self.gated(run, groups)
        slopes = gates.zeros()

        def add(parameter: str, gradient: Tensor) -> None:
            if (name := gates.owner(parameter)) is not None:
                slopes[name] += gates.by_gate(parameter, gradient)

        with gates.network.running():
            for number, (batch, share) in enumerate(weighted(self.read(run))):
                gates.network.differentiate(batch, add, number, share)
        return {
            group.name: summed(group, {n: slopes[n].abs() for n in group.rows}) for group in groups
        }
