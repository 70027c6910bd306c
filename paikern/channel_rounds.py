"""The rounds of a method that removes channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paikern.budget import keep_count
from paikern.channels import Kept, Ranking, channel_masks, encoded, kept_of, kept_weights
from paikern.errors import SparsityError
from paikern.pathgraph.channels import ChannelGroups
from paikern.progress import Progress, ProgressFunction
from paikern.scorers.base import Run
from paikern.scorers.channel_scorer import ChannelScorer

SCOPES = ("global", "local", "uniform")


def check_channels(scope: str, rule: str, pattern: Any, name: str) -> None:
    """Refuse what counts single weights."""
    if pattern is not None:
        raise ValueError(
            f"pattern='{pattern}': {name} removes whole channels; use pattern='unstructured'"
        )
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: {name} removes whole channels; use one of {SCOPES}")
    if rule != "exact":
        raise ValueError(f"selection={rule!r}: {name} selects exactly; use selection='exact'")


def run_channel_rounds(
    run: Run,
    scorer: ChannelScorer,
    fractions: list[float],
    scope: str,
    on_collapse: str,
    progress: bool | ProgressFunction | None,
    channels: Mapping[str, Tensor] | None = None,
    final: bool = True,
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The packed masks after removing each of `fractions`, and what each round kept.

    Channels that are gone stay so, those that earlier masks removed too: their `MaskSet.channels`
    are `channels`, and they are in `run.masks`. `run.cache["kept_channels"]` has those that are
    left. `final` says that the last of `fractions` is what was asked for, so that a count that
    could not be met is worth a note.
    """
    groups = scorer.groups(run)
    _note_whole(run, groups)
    kept = kept_of(groups, channels or {})
    total = sum(torch.Size(shape).numel() for shape in run.shapes.values())
    history: list[dict[str, float]] = []
    rescued: list[str] = []
    died: dict[str, int] = {}  # in which round
    with Progress(scorer.name, len(fractions), "round", progress) as bar:
        for done, fraction in enumerate(fractions, 1):
            if fraction > 0:
                scores = scorer.channel_scores(run, groups)
                dead = _dead(groups, scores, kept)
                if dead and not history and not channels:
                    raise _no_information(scorer, dead[0])
                for name in dead:
                    died.setdefault(name, done)
                scores = scorer.preferred(run, groups, scores)
                ranking = Ranking(groups, scores, kept, local=scope != "global", least=scorer.least)
                kept = _selected(run, scorer, groups, ranking, scope, fraction)
                rescued = ranking.rescued(kept) if scope == "global" else []
            run.masks = channel_masks(groups, kept, run.layouts, run.shapes)
            if rescued and on_collapse == "raise":
                raise SparsityError(
                    f"layer collapse: {_listed(rescued)} would keep no channel; use a lower "
                    "sparsity, scope='local', or on_collapse='floor'"
                )
            nodes = sum(int(g.nodes[kept[g.name]].sum()) for g in groups)
            weights = kept_weights(groups, kept, run.layouts, run.shapes)
            values = {"density": nodes / groups.nodes, "weight_density": weights / total}
            bar.update(**values)
            history.append({"round": done, **values})
    _note_dead(run, scorer, died)
    _note_rescued(run, rescued, on_collapse)
    if final and fractions[-1] > 0:
        _note_count(run, groups, kept, scorer, fractions[-1], scope)
    run.cache["kept_channels"] = kept
    return run.masks, history


def channel_metadata(run: Run) -> dict[str, Any]:
    """What a mask file keeps of the channels of a run."""
    groups: ChannelGroups = run.cache["channel_groups"]
    return {
        "channels": encoded(groups, run.cache["kept_channels"]),
        "kept_whole": groups.kept_whole,
    }


def _selected(
    run: Run,
    scorer: ChannelScorer,
    groups: ChannelGroups,
    ranking: Ranking,
    scope: str,
    fraction: float,
) -> Kept:
    if scorer.target == "weights":
        total = sum(torch.Size(shape).numel() for shape in run.shapes.values())
        return ranking.with_weights(keep_count(total, fraction), run.layouts, run.shapes)
    if scope == "global":
        return ranking.with_nodes(keep_count(groups.nodes, fraction))
    return ranking.with_fraction(fraction)


def _dead(groups: ChannelGroups, scores: Mapping[str, Tensor], kept: Kept) -> list[str]:
    """The groups that have a score of 0 for all that is left of them."""
    return [g.name for g in groups if not bool(scores[g.name][kept[g.name]].any())]


def _no_information(scorer: ChannelScorer, name: str) -> ValueError:
    return ValueError(
        f"{name}: {scorer.name} scores all of its channels 0, so nothing tells them apart (a norm "
        "after it whose weight is 0, or a dead activation?); train for a few steps first, or leave "
        f"it out with ignore=[{name!r}]"
    )


def _note_dead(run: Run, scorer: ChannelScorer, died: Mapping[str, int]) -> None:
    if died:
        shown = _listed([f"{name} (round {number})" for name, number in died.items()])
        run.notes.append(
            f"{shown}: {scorer.name} scores all of the channels that are left 0, so nothing tells "
            "them apart any more; use fewer rounds or a lower sparsity"
        )


def _note_whole(run: Run, groups: ChannelGroups) -> None:
    held = {
        name: reason
        for name, reason in groups.kept_whole.items()
        if reason != "its outputs are those of the model"
    }
    if held:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(held.items())[:3])
        more = f"; and {len(held) - 3} more" if len(held) > 3 else ""
        run.notes.append(f"{len(held)} layers keep all of their channels ({shown}{more})")


def _note_rescued(run: Run, rescued: list[str], on_collapse: str) -> None:
    if rescued and on_collapse == "warn":
        run.notes.append(
            f"{_listed(rescued)} would have lost all channels and "
            f"{'keeps its' if len(rescued) == 1 else 'keep their'} best one"
        )


def _note_count(
    run: Run,
    groups: ChannelGroups,
    kept: Kept,
    scorer: ChannelScorer,
    fraction: float,
    scope: str,
) -> None:
    """Say so where another number is kept than was asked for, and why."""
    if scorer.target == "weights":
        wanted = keep_count(sum(torch.Size(s).numel() for s in run.shapes.values()), fraction)
        found, what = kept_weights(groups, kept, run.layouts, run.shapes), "weights"
    else:
        wanted = keep_count(groups.nodes, fraction)
        found, what = sum(int(g.nodes[kept[g.name]].sum()) for g in groups), "nodes"
    least = {group.name: max(1, math.ceil(scorer.least * group.size)) for group in groups}
    at_floor = all(int(kept[name].sum()) == count for name, count in least.items())
    if found > wanted and at_floor:
        run.notes.append(
            f"every layer is down to what it keeps in any case: {found} {what} where "
            f"sparsity={fraction} asks for {wanted}"
        )
    elif found != wanted and what == "nodes" and scope == "global":
        run.notes.append(
            f"{found} nodes are kept where sparsity={fraction} asks for {wanted}: coupled layers "
            "lose channels of several nodes at once, and no choice of them makes up the number"
        )


def _listed(names: list[str], most: int = 5) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
