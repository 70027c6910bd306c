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

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import ClassVar

from torch import Tensor

from paikern.scorers.base import Report, Run, TrainedScorer, register_scorer
from paikern.scorers.dpai_state import SavedRun
from paikern.scorers.dpai_trainer import DPaITrainer, StepStatistics
from paikern.scores import Scores

OPTIMIZERS = ("ascent", "adam")


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
        keep_nodes: hold one weight into and out of every unit from the first step to the last, so
            that no node dies (`paikern.scorers.dpai_nodes`; not part of the papers).
        revive: give the edges of dead nodes a gradient from the counts of the dense network. Runs
            step by step in Python, about four times slower; not part of the papers.
        state: a file that the run is saved to once a minute, when it is interrupted and when it
            ends, and that it goes on from where it exists: the result is bit for bit that of a
            run without the interruption. `steps` may be raised to train a finished run further.
    """

    steps: int | None = None
    lr: float | None = None
    alpha: float = 0.99
    beta: float = 0.5
    optimizer: str | None = None
    init_scores: Mapping[str, Tensor] | None = None
    patience: int | None = None
    keep_nodes: bool = False
    revive: bool = False
    state: str | os.PathLike[str] | None = None

    summary = "differentiable pruning at initialisation: trains scores for log paths and nodes"
    source = "DPaI, algorithm 1"
    cost = "2 sweeps of one input a step, 300 steps"
    weakness = "nodes die for good; an error where no path is left, as can be at 99 %"
    needs_inputs: ClassVar[bool] = True
    default_scope: ClassVar[str] = "erk"
    reads_weights: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ("paper", "published")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "lr"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not number and not (name == "lr" and value is None):
                raise ValueError(f"{name} must be a number, got {value!r}")
        for name in ("steps", "patience"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        for name in ("keep_nodes", "revive"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.state is not None and not isinstance(self.state, (str, os.PathLike)):
            raise ValueError(f"state must be a file name or path, got {self.state!r}")
        if self.state is not None and not str(self.state):
            raise ValueError("state must be a file name or path, got ''")
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
            keep_nodes=self.keep_nodes,
            revive=self.revive,
            state=self.state,
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
        if self.state is None:
            self._follow(trainer, settings, report)
            trainer.refuse_dead()
            return trainer.scores
        with SavedRun(self.state, trainer) as saved:
            for found in saved.resume(settings.steps):
                report(found.step, found.values())
            self._follow(trainer, settings, report, saved)
        trainer.refuse_dead()
        return trainer.scores

    @staticmethod
    def _follow(
        trainer: DPaITrainer, settings: DPaI, report: Report, saved: SavedRun | None = None
    ) -> None:
        assert settings.steps is not None
        patience = settings.patience or 0
        if patience and trainer.unchanged >= patience:
            return  # a saved run that had stopped
        for found in trainer.train(settings.steps - trainer.steps, patience):
            if saved is not None:
                saved.tick()
            report(found.step, found.values())
        if trainer.steps < settings.steps:
            trainer.run.notes.append(
                f"dpai: stopped after {trainer.steps} steps, the mask had not changed "
                f"for {settings.patience}"
            )


__all__ = ["DPaI", "DPaITrainer", "StepStatistics"]
