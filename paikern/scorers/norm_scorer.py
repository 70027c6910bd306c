"""What the methods that rank channels by their batch norms have in common."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from paikern.pathgraph.channels import ChannelGroup, ChannelGroups
from paikern.scorers.base import Run


def normed(run: Run, groups: ChannelGroups, method: str) -> ChannelGroups:
    """The groups that a batch norm with weights reads; the others are kept whole, in every round.

    Raises:
        ValueError: there is none.
    """
    if "normed_groups" in run.cache:
        known: ChannelGroups = run.cache["normed_groups"]
        return known
    found, whole = [], dict(groups.kept_whole)
    for group in groups:
        if norms_of(run, group):
            found.append(group)
        else:
            whole |= dict.fromkeys(group.rows, "no batch norm with weights follows it")
    if not found:
        raise ValueError(
            f"model: {type(run.model).__name__} has no batch norm with weights after a layer whose "
            f"channels could go, and {method} ranks channels by them; use l1_filters or snap"
        )
    # What the run's other parts know as its groups, too.
    run.cache["normed_groups"] = run.cache["channel_groups"] = ChannelGroups(tuple(found), whole)
    return run.cache["channel_groups"]


def norms_of(run: Run, group: ChannelGroup) -> dict[str, Tensor]:
    """Path of each batch norm with weights -> the channels of its entries."""
    return {
        path: channels
        for path, channels in group.norms.items()
        if isinstance(norm := run.model.get_submodule(path), _BatchNorm) and norm.affine
    }


def norm_sums(run: Run, groups: ChannelGroups, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of the entries of each norm, by its path, added up by channel: float64 `[size]`."""
    scores = {}
    for group in groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for path, channels in norms_of(run, group).items():
            ours = channels >= 0
            total.index_add_(0, channels[ours], of[path].detach().to("cpu", torch.float64)[ours])
        scores[group.name] = total
    return scores
