"""Random channels: the baseline of structured pruning.

Source: the EarlyCroP comparison (Rachwan et al. 2022, arXiv:2206.10451): in every layer a random
fraction of the outputs is removed, one at least stays.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from paikern.pathgraph.channels import ChannelGroups
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.channel_scorer import ChannelScorer


@register_scorer("random_s")
class RandomS(ChannelScorer):
    """Score ~ U(0, 1), drawn on the CPU group by group from `seed`: the same on any device.

    Args:
        target: what `sparsity` is a fraction of, "nodes" (outputs of layers) or "weights".

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4)), torch.ones(1, 8)
        >>> pk.prune(net, "random_s", sparsity=0.75, example_inputs=x).node_sparsity
        0.75
    """

    summary: ClassVar[str] = "random channels, the same fraction of every layer; structured"
    source: ClassVar[str] = "baseline of Rachwan et al. 2022"
    cost: ClassVar[str] = "one draw a channel"
    weakness: ClassVar[str] = "every layer keeps its share, whatever it is worth"
    default_scope: ClassVar[str] = "local"
    reads_weights: ClassVar[bool] = False

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        generator = run.generator()
        return {
            group.name: torch.rand(group.size, generator=generator, dtype=torch.float64)
            for group in groups
        }
