"""EarlyBird's choice of channels: those with the largest batch-norm weights.

    S = |gamma|

The method trains with an L1 penalty on gamma and draws its ticket when this choice has settled;
that part is `pk.pruner("earlybird_ticket", ...)`.

Source: You et al. 2020 (arXiv:1909.11957), section 3, after network slimming, Liu et al. 2017
(arXiv:1708.06519).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from paikern.pathgraph.channels import ChannelGroups
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.channel_scorer import ChannelScorer
from paikern.scorers.norm_scorer import norm_sums, normed, norms_of


@register_scorer("earlybird")
class EarlyBirdChannels(ChannelScorer):
    """`|gamma|` of the batch norms that read a channel, added up.

    Layers that no batch norm follows keep all of their channels. At initialisation, where all gamma
    are 1, nothing tells channels apart but how many norms read them, and ties go to the lower one.

    Args:
        target: as in `l1_filters`.

    Raises:
        ValueError: no batch norm with weights.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("resnet20", image_size=8), torch.randn(1, 3, 8, 8)
        >>> round(pk.prune(net, "earlybird", sparsity=0.5, example_inputs=x).node_sparsity, 3)
        0.5
    """

    summary: ClassVar[str] = "channels with the largest |gamma| of batch norm; structured, no data"
    source: ClassVar[str] = "You et al. 2020; Liu et al. 2017"
    cost: ClassVar[str] = "one read of the batch norms"
    weakness: ClassVar[str] = (
        "needs batch norm; at initialisation all gammas are 1 and channels go by their number"
    )

    def groups(self, run: Run) -> ChannelGroups:
        return normed(run, super().groups(run), self.name)

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        paths = {path for group in groups for path in norms_of(run, group)}
        return norm_sums(run, groups, {p: run.state[f"{p}.weight"].abs() for p in paths})
