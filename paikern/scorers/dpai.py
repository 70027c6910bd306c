"""DPaI: differentiable pruning at initialisation.

Source: the DPaI poster, algorithm 1 (objective `(1-alpha) log R_P + alpha log(nodes, kernels)`
under a layer budget from ERK). Scores `s` are trained; the mask is the top-k of |s| per layer;
the gradient of log R_P with respect to the mask goes straight through to the scores, weighted by
whether the node and the kernel of a weight are alive:

    q = d log R_P / d M,   p = sign(s) * q,   s += step * u * p,
    u = 1 for a dead node, (1-alpha) + alpha beta for a live node with a dead kernel,
        1 - alpha for a live kernel.

No weight is read. A step is one sweep forwards, one backwards, and one pass over the scores of
each layer that forms q tile by tile, finds dead kernels in the tile and updates in place.

`variant="paper"` counts true paths. `variant="published"` follows the authors' program: every
layer divides its input by its maximum and the division stays in the derivative, which equals the
true count on chains only; Adam; budgets rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import PaikernError
from paikern.pathgraph import Flow, Semantics, Visit, weights
from paikern.scorers.base import Report, Run, TrainedScorer, register_scorer
from paikern.scorers.random import normal_scores
from paikern.scores import Dense, Scores

OPTIMIZERS = ("ascent", "adam")


@dataclass(frozen=True)
class StepStatistics:
    """One step, on the mask before its update. `objective` is log R_P, or J where published."""

    step: int
    objective: float
    nodes: int
    kernels: int
    params: int
    published: bool = False

    def values(self) -> dict[str, float]:
        """As shown by the progress bar and kept in the history; J is no path count."""
        return {
            "objective" if self.published else "log_paths": self.objective,
            "effective_nodes": self.nodes,
            "effective_kernels": self.kernels,
            "effective_params": self.params,
        }


@register_scorer("dpai")
class DPaI(TrainedScorer):
    """Trains scores for `steps` steps and keeps the top-k of |s| in every layer.

    Args:
        steps: number of updates; default 300 (paper), 3000 (published).
        lr: step size; default 0.1 per weight kept (paper, ascent), 0.005 (Adam).
        alpha, beta: weights of the node and kernel terms, in [0, 1].
        optimizer: "ascent" (s += lr * k_l * a, default of the paper variant) or "adam".
        init_scores: name -> tensor to start from; standard normal from `seed` otherwise.
        patience: stop when the mask has not changed for so many steps; None never stops early.
    """

    steps: int | None = None
    lr: float | None = None
    alpha: float = 0.99
    beta: float = 0.5
    optimizer: str | None = None
    init_scores: Mapping[str, Tensor] | None = None
    patience: int | None = None

    summary = "differentiable pruning at initialisation: trains scores for log paths and nodes"
    source = "DPaI, algorithm 1"
    needs_inputs: ClassVar[bool] = True
    default_scope: ClassVar[str] = "erk"
    reads_weights: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ("paper", "published")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be >= 1, got {self.patience}")
        if self.optimizer not in (None, *OPTIMIZERS):
            raise ValueError(f"optimizer must be 'ascent' or 'adam', got {self.optimizer!r}")

    def resolved(self, variant: str) -> DPaI:
        """The same settings with the defaults of a variant filled in."""
        published = variant == "published"
        optimizer = self.optimizer or ("adam" if published else "ascent")
        return DPaI(
            steps=(3000 if published else 300) if self.steps is None else self.steps,
            lr=(0.005 if optimizer == "adam" else 0.1) if self.lr is None else self.lr,
            alpha=self.alpha,
            beta=self.beta,
            optimizer=optimizer,
            init_scores=self.init_scores,
            patience=self.patience,
        )

    def planned_steps(self, variant: str) -> int:
        return self.resolved(variant).steps or 0

    def train(
        self, run: Run, kept: list[int], report: Report = lambda step, values: None
    ) -> Scores:
        """Run all steps; returns the trained scores, whose top-k per layer is the mask."""
        settings = self.resolved(run.variant)
        trainer = DPaITrainer(run, settings, kept)
        assert settings.steps is not None
        unchanged = 0
        for _ in range(settings.steps):
            before = trainer.masks
            found = trainer.step()
            report(found.step, found.values())
            if settings.patience is not None:
                trainer.select()
                same = all(torch.equal(before[n], trainer.masks[n]) for n in before)
                unchanged = unchanged + 1 if same else 0
                if unchanged >= settings.patience:
                    run.notes.append(
                        f"dpai: stopped after {trainer.steps} steps, the mask had not changed "
                        f"for {settings.patience}"
                    )
                    break
        return trainer.scores


class DPaITrainer:
    """The state of a DPaI run: scores, Adam moments, the current mask, the number of steps.

    Args:
        run: model tensors, layers and seed.
        settings: with every default filled in (`DPaI.resolved`).
        kept: number of weights each layer keeps, in layer order.
    """

    def __init__(self, run: Run, settings: DPaI, kept: list[int]) -> None:
        self.run = run
        self.settings = settings
        self.kept = kept
        self.published = run.variant == "published"
        self.s = _start(run, settings.init_scores)
        adam = settings.optimizer == "adam"
        self.m = {n: torch.zeros_like(s) for n, s in self.s.items()} if adam else {}
        self.v = {n: torch.zeros_like(s) for n, s in self.s.items()} if adam else {}
        assert settings.lr is not None
        # Ascent: |q| is about 1 / k_l, so that a step is scaled by the number kept.
        self._lr = {n: settings.lr * (1 if adam else k) for n, k in zip(self.s, kept, strict=True)}
        self.steps = 0
        self.masks: dict[str, Tensor] = {}
        self._selected_at = -1
        # Thresholds move little from step to step: that halves the time of a small layer.
        start = next(iter(self.s.values()))
        self._memory = start.new_full((len(self.s), 2), math.nan, dtype=torch.float64)
        self._flow: Flow = run.flow(
            Semantics(power=0), rescale="input_max" if self.published else "exponent"
        )
        # Maps of one sweep need no state but the device: no weight value is ever read.
        self._uses = run.graph.uses()
        self.select()

    @property
    def scores(self) -> Scores:
        return Scores({n: Dense(s, absolute=True) for n, s in self.s.items()}, self.run.shapes)

    def select(self) -> None:
        """The mask of the scores as they are: top-k of |s| in every layer."""
        if self._selected_at == self.steps:
            return
        packed = ops.topk_mask(
            list(self.s.values()), self.kept, absolute=True, memory=self._memory, names=list(self.s)
        )
        self.masks = dict(zip(self.s, packed, strict=True))
        self._selected_at = self.steps

    def step(self) -> StepStatistics:
        """One update of every layer; returns what the mask before it was worth."""
        with registry.using(None):
            return self._step()

    def _step(self) -> StepStatistics:
        self.select()
        objective = self._flow.forward(self.run.state, self.masks, outputs=True)
        if objective == -math.inf or math.isnan(objective):
            raise PaikernError(
                f"dpai: dead network at step {self.steps + 1}: no path from the input to the "
                f"output is left{self._flow.where_dead}; lower the sparsity or use another seed"
            )
        self.steps += 1
        mantissa, top = self._flow.total
        counts = {"nodes": 0, "kernels": 0, "params": 0}
        gathered: dict[str, tuple[Tensor, Tensor]] = {}

        def visit(v: Visit) -> None:
            name = v.step.parameter
            if name not in self.s:
                return
            scale = 1.0 if self.published else math.ldexp(1.0 / mantissa, v.exponent - top)
            live = _live_nodes(v)
            if len(self._uses[name]) > 1 or v.step.rows is not None:
                self._gather(gathered, v, scale, live)
                return
            self._count(counts, live, *self._update(v, scale, live))

        self._flow.backward(visit)
        for name, (q, live) in gathered.items():
            transposed = self._uses[name][0].transposed
            found = ops.dpai_update_(
                self.s[name], q, self.masks[name], live,
                exp_avg=self.m.get(name), exp_avg_sq=self.v.get(name),
                alpha=self.settings.alpha, beta=self.settings.beta,
                lr=self._lr[name], t=self.steps,
                groups=self._uses[name][0].groups, transposed=transposed,
            )  # fmt: skip
            self._count(counts, live, *self._checked(name, found))
        return StepStatistics(self.steps, objective, **counts, published=self.published)

    def _update(self, v: Visit, scale: float, live: Tensor) -> tuple[int, int]:
        step, name = v.step, v.step.parameter
        s = self.s[name]
        x, g = (v.g, v.x) if step.transposed else (v.x, v.g)
        if step.kind == "linear":
            x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        # The kernel itself: its operation would check shapes that tracing has checked.
        found = weights.kernel("dpai_step_", s, x)(
            s, self.masks[name], x.contiguous(), g.contiguous(), live,
            self.m.get(name), self.v.get(name), scale,
            self.settings.alpha, self.settings.beta, self._lr[name], self.steps,
            step.stride, step.padding, step.dilation, step.groups, step.transposed,
        )  # fmt: skip
        return self._checked(name, found.tolist())

    def _checked(self, name: str, found: Sequence[int]) -> tuple[int, int]:
        params, kernels, finite = found
        if not finite:
            raise PaikernError(
                f"dpai: scores of {name} are NaN or infinite after step {self.steps}; "
                "use a smaller lr"
            )
        return params, kernels

    def _gather(
        self, into: dict[str, tuple[Tensor, Tensor]], v: Visit, scale: float, live: Tensor
    ) -> None:
        """q of a parameter that is used twice or by rows: summed before its one update."""
        step, name = v.step, v.step.parameter
        q = weights.score(step, v.x, v.g, {name: self.s[name]}, {}, 0) * scale
        rows = slice(None) if step.rows is None else slice(*step.rows)
        if name not in into:
            nodes = self.s[name].shape[0] if step.rows is not None else live.numel()
            into[name] = (torch.zeros_like(self.s[name]), torch.zeros(nodes, dtype=torch.uint8))
        total, nodes_live = into[name]
        total[rows] += q
        nodes_live[rows] |= live

    @staticmethod
    def _count(counts: dict[str, int], live: Tensor, params: int, kernels: int) -> None:
        counts["nodes"] += sum(live.tolist())  # a torch sum costs three times as much here
        counts["params"] += params
        counts["kernels"] += kernels


def _live_nodes(v: Visit) -> Tensor:
    assert v.y is not None
    return ops.live_nodes(v.y, v.g, -1 if v.step.kind == "linear" else 1)


def _start(run: Run, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if given is None:
        return normal_scores(run)
    for name in given:
        if name not in run.layers:
            raise ValueError(f"init_scores: {name!r} is no prunable parameter of this model")
    start = {}
    for name, layer in run.layers.items():
        if name not in given:
            raise ValueError(f"init_scores: scores for {name!r} are missing")
        if tuple(given[name].shape) != layer.shape:
            raise ValueError(
                f"init_scores[{name!r}] must have shape {layer.shape}, "
                f"got {tuple(given[name].shape)}"
            )
        if not bool(torch.isfinite(given[name]).all()):
            raise ValueError(f"init_scores[{name!r}] holds NaN or infinite values")
        start[name] = given[name].detach().to("cpu", torch.float32).contiguous().clone()
    return start
