"""The SynFlow family: synaptic flow, its squared forms, and its logarithmic form.

Source: Tanaka et al. 2020 (arXiv:2006.05467), algorithm 1 and equation 2 for SynFlow;
Gebhart et al. 2021 (arXiv:2101.10552) for SynFlow-L2 and the path kernel; Cavagnero et al. 2023
(arXiv:2207.05135) for LogSynFlow. `docs/methods.md` holds the table of what each computes.

All of them sweep a network of positive weights `V = |w|**p_net` with an input of ones, R being
the sum of its outputs, and score `|w|**p_score * dR/dV`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paikern import ops
from paikern.errors import PaikernError
from paikern.pathgraph import Flow, Program, Semantics, Visit, weights
from paikern.pathgraph.flow import Cotangent
from paikern.pathgraph.steps import Norm, Weight
from paikern.scorers.base import Run, Scorer, register_scorer
from paikern.scorers.device_loop import DeviceLoop
from paikern.scorers.path_loop import PathLoop, path_loop
from paikern.scores import Dense, Factored, Score, Scores


@dataclass
class PathScorer(Scorer):
    """Scores from the two sweeps.

    Args:
        norm: "scale" multiplies by the positive factor of each norm layer, |gamma| (over the
            standard deviation where running statistics exist); "identity" leaves norms out,
            which is what a network with zero-initialised gammas needs.
        monotone: pruned weights stay pruned in later rounds.
        conv: "exact", or "shift_invariant" to take every map as constant over space, without
            border effects: faster on large images (see `paikern.pathgraph.shift_invariant`).
    """

    norm: str = "scale"
    monotone: bool = True
    conv: str = "exact"

    needs_inputs: ClassVar[bool] = True
    default_rounds: ClassVar[int] = 100
    variants: ClassVar[tuple[str, ...]] = ("paper", "published")

    def __post_init__(self) -> None:
        if self.norm not in ("scale", "identity"):
            raise ValueError(f"norm must be 'scale' or 'identity', got {self.norm!r}")
        if self.conv not in ("exact", "shift_invariant"):
            raise ValueError(f"conv must be 'exact' or 'shift_invariant', got {self.conv!r}")

    @property
    def powers(self) -> tuple[int, int]:
        """(p_net, p_score)."""
        return 1, 1

    def score(self, run: Run) -> Scores:
        p_net, _ = self.powers
        semantics = Semantics(p_net, self.norm, offsets=run.variant == "published")
        flow = run.flow(semantics, self.conv)
        if self.norm == "scale" and not run.masks:
            note_closed_norms(run)
        if flow.forward(run.state, run.masks) == -math.inf:
            raise self._dead(flow.where_dead)
        uses = run.graph_of(self.conv).uses()
        found: dict[str, Score] = {}

        def visit(v: Visit) -> None:
            name = v.step.parameter
            if name not in run.layers:
                return
            if len(uses[name]) == 1 and v.step.rows is None:
                found[name] = self._score_of(run, v, -1.0 if self.monotone else 0.0)
            else:
                part = self._score_of(run, v, 0.0)
                found[name] = _gather(found.get(name), v.step, part, run.shapes[name])

        flow.backward(visit, self.cotangent(run, flow))
        for name, steps in uses.items():
            if name in found and self.monotone and (len(steps) > 1 or steps[0].rows):
                _exclude_pruned(found[name], run, name)
        none = {n: Dense(_zeros(run, n)) for n in run.layers if n not in found}
        return Scores({name: {**found, **none}[name] for name in run.layers}, run.shapes)

    def loop(self, run: Run) -> PathLoop | DeviceLoop | None:
        if not self.monotone:
            return None
        if self.norm == "scale":
            note_closed_norms(run)
        semantics = Semantics(self.powers[0], self.norm, offsets=run.variant == "published")
        return path_loop(run, run.flow(semantics, self.conv), self.powers[1], self._dead)

    def _dead(self, where: str) -> PaikernError:
        return PaikernError(
            f"{self.name}: no path from the input to the output is left{where}, so "
            "no weight scores above 0; use more rounds, a lower sparsity, "
            "on_collapse='floor', or norm='identity' where norms are initialised to zero"
        )

    def cotangent(self, run: Run, flow: Flow | Program) -> Cotangent | None:
        """The weights of the outputs in R, asked for between the two sweeps; None for ones."""
        return None

    def statistics(self, run: Run) -> dict[str, float]:
        semantics = Semantics(self.powers[0], self.norm, offsets=run.variant == "published")
        return {"log_flow": run.flow(semantics, self.conv).log_total}

    def _score_of(self, run: Run, v: Visit, pruned: float) -> Score:
        """The score of one weight step; `pruned` is the value where the mask is 0."""
        step, power = v.step, self.powers[1]
        vectors = step.kind == "linear" and step.positions == 1
        # Kernels that make scores from maps read weights of at most 32 bits.
        maps = vectors or (
            run.weight(step.parameter).dtype != torch.float64 and self._maps_are_small(run)
        )
        if pruned < 0 and step.rows is None and maps:
            a, g = (v.g, v.x) if step.transposed else (v.x, v.g)
            conv = None
            if vectors:
                a, g = a.reshape(-1), g.reshape(-1)
            elif step.kind == "linear":
                a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
            else:
                conv = (step.stride, step.padding, step.dilation, step.groups)
            mask = run.masks.get(step.parameter)
            w = run.weight(step.parameter)
            if step.kind == "linear":
                w = w.flatten(1)
            return Factored(w, power, a, g, v.exponent, mask, conv)
        values = weights.score(step, v.x, v.g, run.state, run.masks, power, pruned)
        return Dense(_shaped(values, run, step), v.exponent)

    def _maps_are_small(self, run: Run) -> bool:
        """Whether the maps of all layers take less than half the memory of their scores.

        Scores that are left as factors keep both maps of their layer until the selection.
        """
        steps = [s for s in run.graph_of(self.conv).weights if s.parameter in run.layers]
        maps = sum(math.prod(s.in_shape) + math.prod(s.out_shape) for s in steps)
        return 2 * maps <= sum(math.prod(run.shapes[name]) for name in run.layers)


@register_scorer("synflow")
class SynFlow(PathScorer):
    """`|w| * dR/d|w|`, 100 rounds on an exponential schedule."""

    summary = "synaptic flow |w| dR/d|w|, iterative, data-free"
    source = "Tanaka et al. 2020, eq. 2"
    cost = "2 sweeps of one input a round"
    weakness = "one round at 90 % or more can leave no path; shortcuts with weights can be emptied"


@register_scorer("synflow_l2")
class SynFlowL2(PathScorer):
    """The squared forms. Results called "SynFlow-L2" differ, so the definition is part of a name.

    Args:
        definition: "a" is the path kernel `w**2 * dR(w**2)/dw**2`; "b" is the code of its
            authors, `w**2 * dR(|w|)/d|w|`; "c" is `|w| * dR(w**2)/dw**2`, found in a later code.
    """

    definition: str = "a"

    summary = "squared synaptic flow; definition='a' path kernel, 'b', 'c' as published"
    source = "Gebhart et al. 2021"
    cost = "2 sweeps of one input a round"
    weakness = "empties 6 layers of a ResNet-20 at 95 %, 12 at 99 %; definition c more easily"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.definition not in ("a", "b", "c"):
            raise ValueError(f"definition must be 'a', 'b' or 'c', got {self.definition!r}")

    @property
    def powers(self) -> tuple[int, int]:
        return {"a": (2, 2), "b": (1, 2), "c": (2, 1)}[self.definition]


@register_scorer("logsynflow")
class LogSynFlow(PathScorer):
    """`|w| * ln(1 + dR/d|w|)`; exponents are undone first, as the logarithm is not homogeneous."""

    norm: str = "identity"

    def loop(self, run: Run) -> None:
        """Its scores are no product of factors."""

    summary = "|w| ln(1 + dR/d|w|), norms left out"
    source = "Cavagnero et al. 2023"
    cost = "2 sweeps of one input a round"
    weakness = "empties 6 layers of a ResNet-20 at 99 %; a weight that is used twice is refused"

    def _score_of(self, run: Run, v: Visit, pruned: float) -> Score:
        if len(run.graph.uses()[v.step.parameter]) > 1:
            raise PaikernError(
                f"logsynflow: {v.step.parameter} is used more than once; the logarithm of a "
                "summed gradient is not a sum, so leave it out with ignore="
            )
        slope = weights.score(v.step, v.x, v.g, run.state, run.masks, 0, pruned).double()
        w = weights.tensor(v.step, run.state, v.x).abs().double()
        values = w * log1p_scaled(slope.clamp(min=0), v.exponent)
        return Dense(_shaped(torch.where(slope < 0, pruned, values).float(), run, v.step))


def log1p_scaled(x: Tensor, exponent: int) -> Tensor:
    """`ln(1 + x * 2**exponent)` for float64 `x >= 0` and any exponent."""
    if exponent < 900:
        return torch.log1p(x * 2.0**exponent)
    return torch.where(x > 0, x.log() + exponent * math.log(2), 0.0)


def _shaped(values: Tensor, run: Run, step: Weight) -> Tensor:
    """In the shape of the parameter, or of its rows: a step may use it as a matrix."""
    return values.reshape(-1, *run.shapes[step.parameter][1:])


def note_closed_norms(run: Run) -> None:
    """Residual branches are often initialised to end in a norm of zeros; no path crosses it."""
    closed = [
        step.where
        for step in run.graph.steps
        if isinstance(step, Norm) and step.weight and not bool(step.weight(run.state).any())
    ]
    if closed:
        more = f" and {len(closed) - 3} more" if len(closed) > 3 else ""
        run.notes.append(
            f"norms of zeros let no path through: {', '.join(closed[:3])}{more}; "
            "norm='identity' leaves norms out"
        )


def _zeros(run: Run, name: str) -> Tensor:
    return torch.zeros(run.shapes[name], device=run.weight(name).device)


def _gather(held: Score | None, step: Weight, part: Score, shape: tuple[int, ...]) -> Dense:
    """Place the rows of a fused projection; sum over the uses of a shared parameter."""
    new = part if isinstance(part, Dense) else part.dense()
    if not isinstance(held, Dense):
        held = Dense(new.values.new_zeros(shape), new.exponent)
    top = max(held.exponent, new.exponent)
    values = held.values * 2.0 ** (held.exponent - top)
    rows = slice(None) if step.rows is None else slice(*step.rows)
    values[rows] += new.values * 2.0 ** (new.exponent - top)
    return Dense(values, top)


def _exclude_pruned(score: Score, run: Run, name: str) -> None:
    packed = run.masks.get(name)
    if packed is not None and isinstance(score, Dense):
        score.values.masked_fill_(~ops.unpack_mask(packed, run.shapes[name]), -1.0)
