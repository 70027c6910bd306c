"""L1 filters: remove the channels whose weights are smallest.

    S[o] = sum_{i,u,v} |W[o,i,u,v]|

Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (arXiv:1608.08710), section 3.1.
They choose the fraction of each layer by hand; here every group of coupled layers loses the same
one (scope="local"), or all compete (scope="global").
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from paikern.pathgraph.channels import ChannelGroups
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.channel_scorer import ChannelScorer, by_output, summed


@register_scorer("l1_filters")
class L1Filters(ChannelScorer):
    """Sum of |w| over what makes a channel; coupled layers add up.

    Args:
        target: what `sparsity` is a fraction of, "nodes" (outputs of layers) or "weights".

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.ones(1, 8)
        >>> masks = pk.prune(net, "l1_filters", sparsity=0.75, example_inputs=x)
        >>> masks.node_sparsity, masks.channels["layers.1.weight"].sum().item()
        (0.75, 4)
    """

    summary: ClassVar[str] = "channels with the largest sum of |w|; structured, no data"
    source: ClassVar[str] = "Li et al. 2017"
    cost: ClassVar[str] = "one read of the weights"
    weakness: ClassVar[str] = "with scope='global' layers of small weights fall to one channel"
    default_scope: ClassVar[str] = "local"

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        of = {}
        for group in groups:
            for name in group.rows:
                rows = by_output(run.weight(name), *run.layers[name].layout)
                of[name] = torch.linalg.vector_norm(rows, 1, dim=1, dtype=_wide(rows))
        return {group.name: summed(group, of) for group in groups}


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
