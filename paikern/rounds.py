"""Score, keep fewer, repeat: the rounds of a pruning run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paikern import budget, ops
from paikern.channel_rounds import check_channels, run_channel_rounds
from paikern.masks import MaskSet
from paikern.pattern import Pattern
from paikern.progress import Progress, ProgressFunction
from paikern.rows import check_rows, select_rows
from paikern.scorers import MaskBuilder, Run, Scorer, Scores, TrainedScorer
from paikern.scorers.channel_scorer import ChannelScorer
from paikern.scorers.device_loop import DeviceLoop
from paikern.scorers.path_loop import PathLoop
from paikern.selection import (
    apply_collapse_rule,
    collapsed,
    empty_layers,
    other_count,
    select_packed,
)
from paikern.structured import check_pattern, left_dense

History = list[dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """How many weights are kept, where, and along which curve.

    `fraction` is removed in the end, under the budgets of `scope`; `rule` selects, "published" by
    the rule named `published`.
    """

    fraction: float
    scope: str
    rounds: int
    schedule: str
    rule: str
    on_collapse: str
    pattern: Pattern | None = None
    published: str = "above_removed"

    @property
    def is_plain(self) -> bool:
        """Nothing but exact counts of single weights, known before the first round."""
        return (
            self.pattern is None
            and self.rule == "exact"
            and self.scope not in ("row", "lamp")
            and self.on_collapse != "floor"
        )

    def select(
        self, scores: Scores, counts: int | list[int], pattern: Pattern | None
    ) -> dict[str, Tensor]:
        if self.scope == "row" and pattern is None and isinstance(counts, list):
            return select_rows(scores, counts)  # every output keeps some: nothing can collapse
        rule = self.published if self.rule == "published" else self.rule
        packed = select_packed(scores, counts, rule, pattern)
        return apply_collapse_rule(scores, packed, counts, self.on_collapse, pattern)


def run_rounds(
    run: Run, scorer: Scorer, plan: Plan, progress: bool | ProgressFunction | None
) -> tuple[dict[str, Tensor], History]:
    """The packed masks at the end of a run, and what each round or step found."""
    check_single_weights(scorer, plan.pattern)
    if isinstance(scorer, ChannelScorer):
        check_channels(plan.scope, plan.rule, plan.pattern, scorer.name)
        densities = budget.schedule_densities(1 - plan.fraction, plan.rounds, plan.schedule)
        fractions = [1.0 - density for density in densities[:-1]] + [plan.fraction]
        return run_channel_rounds(run, scorer, fractions, plan.scope, plan.on_collapse, progress)
    if isinstance(scorer, MaskBuilder):
        _check_builder(scorer, plan)
    check_pattern(plan.pattern, run.shapes, plan.scope, plan.rule)
    check_rows(plan.scope, plan.rule, run.shapes)
    if (note := left_dense(plan.pattern, run.shapes, run.layouts)) is not None:
        run.notes.append(note)
    if plan.fraction == 0.0:  # nothing to rank
        ones = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in run.layers.items()}
        return {n: ops.pack_mask(mask) for n, mask in ones.items()}, []
    if isinstance(scorer, TrainedScorer):
        return _trained(run, scorer, plan, progress)
    if isinstance(scorer, MaskBuilder):
        return _built(run, scorer, plan, progress)
    return _iterated(run, scorer, plan, progress)


def check_single_weights(scorer: Scorer, pattern: Pattern | None) -> None:
    """Refuse a pattern with a method that finds single weights."""
    if pattern is None:
        return
    if isinstance(scorer, MaskBuilder):
        raise ValueError(
            f"pattern='{pattern}': {scorer.name} builds its mask of single weights; use "
            "pattern='unstructured'"
        )
    if isinstance(scorer, TrainedScorer):
        raise ValueError(
            f"pattern='{pattern}': {scorer.name} trains its scores for single weights; use "
            "pattern='unstructured', or pk.select(pk.score(...), pattern=...)"
        )


def layer_counts(
    run: Run, fraction: float, scope: str, scores: Scores | None = None
) -> int | list[int]:
    """Weights to keep, over all layers or in each."""
    return budget.layer_budget(
        run.shapes,
        fraction,
        scope,
        variant=run.variant,
        scores=ranked(scores, scope),
        layouts=run.layouts,
    )


def _round_counts(run: Run, plan: Plan, densities: list[float]) -> list[int | list[int]]:
    """`layer_counts` of every round, by layers never growing; not for "lamp", which ranks."""
    removed = [1.0 - density for density in densities[:-1]] + [plan.fraction]
    counts = [layer_counts(run, fraction, plan.scope) for fraction in removed]
    by_layer = [k for k in counts if not isinstance(k, int)]
    return counts if len(by_layer) < len(counts) else [*budget.falling_budgets(by_layer)]


def ranked(scores: Scores | None, scope: str) -> dict[str, Tensor] | None:
    """Dense scores for the one scope that ranks them to make budgets."""
    if scope != "lamp" or scores is None:
        return None
    top = scores.exponent  # LAMP compares within a layer, so any common factor will do
    found = {name: scores.dense(name, torch.float64, relative_to=top) for name in scores}
    # LAMP squares: a negative score, the mark of a weight that may not return, would rank high.
    return {name: values.clamp(min=0) for name, values in found.items()}


def _trained(
    run: Run, scorer: TrainedScorer, plan: Plan, progress: bool | ProgressFunction | None
) -> tuple[dict[str, Tensor], History]:
    counts = layer_counts(run, plan.fraction, plan.scope)
    if isinstance(counts, int) or plan.scope == "row":
        raise ValueError(
            f"scope: {scorer.name} keeps a number of weights in every layer; "
            "use scope='erk' or scope='local'"
        )
    steps = scorer.planned_steps(run.variant)
    history: History = []
    every = max(1, steps // 200)
    with Progress(scorer.name, steps, "step", progress) as bar:

        def report(step: int, values: dict[str, float]) -> None:
            bar.update(**values)
            if step == 1 or step == steps or step % every == 0:
                history.append({"step": step, **values})

        scores = scorer.train(run, counts, report)
    packed = plan.select(scores, counts, None)
    _note_count(run, plan, MaskSet(packed, run.shapes).kept, counts)
    return packed, history


def _check_builder(scorer: MaskBuilder, plan: Plan) -> None:
    """Refuse what needs scores to rank."""
    for given, name, use in (
        (plan.rounds != 1, f"rounds={plan.rounds}", "rounds=1"),
        (plan.scope in ("row", "lamp"), f"scope={plan.scope!r}", f"scope={scorer.default_scope!r}"),
        (plan.rule != "exact", f"selection={plan.rule!r}", "selection='exact'"),
        (plan.on_collapse == "floor", "on_collapse='floor'", "'warn' or 'raise'"),
    ):
        if given:
            raise ValueError(f"{name}: {scorer.name} builds its mask without scores; use {use}")


def _built(
    run: Run, scorer: MaskBuilder, plan: Plan, progress: bool | ProgressFunction | None
) -> tuple[dict[str, Tensor], History]:
    variant = scorer.published_budget if run.variant == "published" else run.variant
    counts = budget.layer_budget(run.shapes, plan.fraction, plan.scope, variant=variant)
    history: History = []
    total = scorer.planned_units(run, counts)
    with Progress(scorer.name, total, scorer.unit, progress) as bar:

        def report(done: int, values: dict[str, float]) -> None:
            bar.reach(done, **values)
            history.append({scorer.unit: done, **values})

        run.masks = scorer.build(run, counts, report)
    if plan.on_collapse == "raise" and (empty := empty_layers(run.masks)):
        raise collapsed(empty)
    return run.masks, history


def _iterated(
    run: Run, scorer: Scorer, plan: Plan, progress: bool | ProgressFunction | None
) -> tuple[dict[str, Tensor], History]:
    """The last round keeps exactly what was asked for; n:m gets there by way of larger n."""
    history: History = []
    total = sum(torch.Size(shape).numel() for shape in run.shapes.values())
    densities = budget.schedule_densities(1 - plan.fraction, plan.rounds, plan.schedule)
    loop = scorer.loop(run) if plan.is_plain else None
    if loop is not None and (plan.scope == "global" or not loop.one_budget):
        return _looped(run, scorer, plan, loop, densities, progress)
    planned = None if plan.scope == "lamp" else _round_counts(run, plan, densities)
    with Progress(scorer.name, len(densities), "round", progress) as bar:
        for done, density in enumerate(densities, 1):
            last = done == len(densities)
            scores = scorer.score(run).with_layouts(run.layouts)
            removed = plan.fraction if last else 1.0 - density
            counts = (
                layer_counts(run, removed, plan.scope, scores)
                if planned is None
                else planned[done - 1]
            )
            pattern = plan.pattern
            if pattern is not None and not last:
                pattern = pattern.at(density)
            run.masks = plan.select(scores, counts, pattern)
            if pattern is not None or plan.rule != "exact":
                kept = MaskSet(run.masks, run.shapes).kept
            else:
                kept = counts if isinstance(counts, int) else sum(counts)
            if last:
                _note_count(run, plan, kept, counts)
            values = {"density": kept / total, **scorer.statistics(run)}
            bar.update(**values)
            history.append({"round": done, **values})
    return run.masks, history


def _note_count(run: Run, plan: Plan, kept: int, counts: int | list[int]) -> None:
    """Say so where a published rule keeps another number than was asked for."""
    if plan.rule != "exact" and (note := other_count(kept, counts)) is not None:
        run.notes.append(note)


def _looped(
    run: Run,
    scorer: Scorer,
    plan: Plan,
    loop: PathLoop | DeviceLoop,
    densities: list[float],
    progress: bool | ProgressFunction | None,
) -> tuple[dict[str, Tensor], History]:
    """The same rounds by a native loop: what each keeps is known before the first."""
    history: History = []
    total = sum(torch.Size(shape).numel() for shape in run.shapes.values())
    given = [[k] if isinstance(k, int) else k for k in _round_counts(run, plan, densities)]
    with Progress(scorer.name, len(densities), "round", progress) as bar:
        rounds = loop.rounds(given, stop_empty=plan.on_collapse == "raise")
        for done, (log_flow, kept) in enumerate(zip(rounds, given, strict=False), 1):
            if plan.on_collapse == "raise" and (empty := empty_layers(run.masks)):
                raise collapsed(empty)
            values = {"density": sum(kept) / total, "log_flow": log_flow}
            bar.update(**values)
            history.append({"round": done, **values})
    return run.masks, history
