"""What the methods that remove whole channels have in common: the groups and the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paikern.pathgraph.channels import ChannelGroup, ChannelGroups, channel_groups
from paikern.scorers.base import Run, Scorer
from paikern.scores import Dense, Scores

TARGETS = ("nodes", "weights")


@dataclass
class ChannelScorer(Scorer):
    """A method that ranks channels; subclasses implement `channel_scores`.

    Args:
        target: what `sparsity` is a fraction of: "nodes", the outputs of all layers whose channels
            can be removed, or "weights", the prunable weights of the whole model, for which the
            number of channels is found by bisection.
    """

    target: str = "nodes"

    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target must be one of {TARGETS}, got {self.target!r}")

    def groups(self, run: Run) -> ChannelGroups:
        """The channels of the model, found once a run.

        Raises:
            ValueError: there is none that can be removed.
        """
        if "channel_groups" not in run.cache:
            found = channel_groups(run.graph, run.state, run.layers)
            if not found.groups:
                reasons = "; ".join(f"{n}: {why}" for n, why in list(found.kept_whole.items())[:3])
                raise ValueError(
                    f"model: {type(run.model).__name__} has no channel that {self.name} could "
                    f"remove ({reasons})"
                )
            run.cache["channel_groups"] = found
        groups: ChannelGroups = run.cache["channel_groups"]
        return groups

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        """Group name -> `[size]` under `run.masks`; higher is kept."""
        raise TypeError(f"{type(self).__name__} must implement channel_scores()")

    def preferred(
        self, run: Run, groups: ChannelGroups, scores: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is ranked: `channel_scores`, and what else speaks for or against a channel."""
        return scores

    def score(self, run: Run) -> Scores:
        """One number for each output of a layer: `[out]`, the same for all that go together."""
        found = {}
        groups = self.groups(run)
        scores = self.preferred(run, groups, self.channel_scores(run, groups))
        for group in groups:
            for name, rows in group.rows.items():
                found[name] = Dense(scores[group.name][rows])
        order = [name for name in run.layers if name in found]
        shapes = {name: tuple(found[name].values.shape) for name in order}
        return Scores({name: found[name] for name in order}, shapes)

    @property
    def least(self) -> float:
        """The fraction of each group that stays whatever its scores; one channel always does."""
        return 0.0


def by_output(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A weight or its gradient as `[out, everything else]`."""
    if not transposed:
        return weight.flatten(1)
    parts = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    return parts.transpose(1, 2).flatten(0, 1).flatten(1)  # [groups, out / groups, in / groups, ..]


def summed(group: ChannelGroup, of: dict[str, Tensor]) -> Tensor:
    """Scores of the outputs of each layer, `[out]` by weight name, added up by channel."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for name, rows in group.rows.items():
        total.index_add_(0, rows, of[name].detach().to("cpu", torch.float64))
    return total


def spread_over(gate: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """A number for each output, `[out]`, in a shape that multiplies the weight."""
    taps = (1,) * (weight.dim() - 2)
    if not transposed:
        return gate.view(-1, 1, *taps)
    rows = gate.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
    return rows.view(*rows.shape, *taps)  # [in, out / groups, ...]
