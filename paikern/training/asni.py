"""ASNI: gradual global magnitude pruning along a sigmoid, one threshold for the whole network.

After each epoch e = 1..E, with `sigma(x) = 1 / (1 + exp(-x))`:

    p(e) = alpha * sigma((e - beta * E) / gamma)      percent of all prunable weights
    z    = floor(p(e) / 100 * N)                      weights removed
    m    = the N - z largest |w| of the survivors, over all layers; ties to the lower index

The pruned weights, and their state in the optimizer, stay 0. At the end two numbers a layer, the
means of its positive and of its negative survivors, describe the network (`centroids`).

Source: Amenable Sparse Network Investigator, algorithm 1. The printed mask compares an undefined
|s|, which is read as |w|; a threshold "at least tau" would keep everything while tau is 0, so
exactly N - z are kept instead. The learning rate is printed as `cos(pi e / (1 + delta) / E)`,
which turns negative in the second half; `learning_rate_factor` is the half-cosine that the
author's training code uses.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from paikern.budget import keep_count
from paikern.errors import SparsityError
from paikern.masks import MaskSet
from paikern.training.base import Event, Pruner, check_finite
from paikern.training.centroids import Centroids
from paikern.training.registry import register_pruner
from paikern.training.survivors import keep_largest


@register_pruner("asni")
class ASNI(Pruner):
    """Gradual global magnitude pruning; `centroids()` gives the network in 2L numbers.

    Args:
        alpha: percent that the sigmoid tends to. Default: what makes the last update reach
            `sparsity` exactly; give one of the two.
        beta: where the sigmoid is steepest, as a fraction of the epochs.
        gamma: epochs in which the sigmoid rises by a factor e at first. Default: epochs / 10 (the
            networks of the paper have 9 to 12.5 in place of 10).
        last_update: the last epoch that prunes; default: all of them.
        delta: of the learning rate, see `learning_rate_factor`.
    """

    alpha: float | None = None
    beta: float = 0.5
    gamma: float | None = None
    last_update: int | None = None
    delta: float = 0.02

    summary = "gradual global magnitude along a sigmoid; two centroids a layer at the end"
    source = "ASNI, algorithm 1"
    needs_sparsity = False

    def begin(self) -> None:
        epochs = self.settings.epochs
        self._gamma = epochs / 10 if self.gamma is None else self.gamma
        self._last = epochs if self.last_update is None else self.last_update
        if not 0 < self._gamma < math.inf:
            raise ValueError(f"gamma must be > 0, got {self.gamma}")
        if not 1 <= self._last <= epochs:
            raise ValueError(f"last_update must be in [1, {epochs}], got {self.last_update}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta must be >= 0, got {self.delta}")
        if (self.alpha is None) == (self.settings.sparsity is None):
            raise SparsityError(
                f"give exactly one of sparsity and alpha; got sparsity={self.settings.sparsity} "
                f"and alpha={self.alpha}"
            )
        if self.alpha is not None:
            self._alpha = float(self.alpha)
            if not 0 < self._alpha < 100:
                raise ValueError(f"alpha must be in (0, 100), percent; got {self.alpha}")
        else:
            rise = self._rise(self._last)
            self._alpha = 100 * self.sparsity / rise if rise else math.inf
            if self._alpha >= 100:
                raise SparsityError(
                    f"sparsity={self.sparsity} would need alpha={self._alpha:.4g}, which must be "
                    f"below 100; use a smaller gamma than {self._gamma:g}, or more epochs"
                )

    def percent(self, epoch: int) -> float:
        """p(epoch), the percentage that is removed after so many epochs."""
        return self._alpha * self._rise(min(epoch, self._last))

    def kept_at(self, epoch: int) -> int:
        """How many weights are kept after so many epochs: N - floor(p / 100 * N)."""
        if epoch >= self._last and self.settings.sparsity is not None:
            return self.final_count  # alpha comes from a division
        return keep_count(self.total, self.percent(epoch) / 100)

    def learning_rate_factor(self, epoch: int) -> float:
        """(1 + cos(pi * epoch / ((1 + delta) * epochs))) / 2, for a `LambdaLR`."""
        turn = math.pi * epoch / ((1 + self.delta) * self.settings.epochs)
        return (1 + math.cos(turn)) / 2

    def centroids(self, model: nn.Module | None = None) -> Centroids:
        """Two means for each layer of the model under the masks; see `Centroids`."""
        return Centroids.of(self.model if model is None else model, self.masks)

    def epoch_end(self, model: nn.Module, epoch: int, data: Any) -> Event:
        if epoch > self._last:
            return self.event(epoch, f"masks are final since epoch {self._last}")
        weights = self.weights(model)
        check_finite(weights, f"epoch {epoch}")
        kept = min(self.kept_at(epoch), self.masks.kept)
        packed = keep_largest(
            weights,
            self.masks,
            kept,
            on_collapse=self.settings.on_collapse,
            when=f"epoch {epoch}",
        )
        percent = self.percent(epoch)
        found = MaskSet(packed, self.shapes, self.provenance(percent=percent, epoch=epoch))
        self.set_masks(model, found)
        return self.event(
            epoch, f"removed {percent:.4f} %", pruned=True, values={"percent": percent}
        )

    def _rise(self, epoch: int) -> float:
        power = (self.beta * self.settings.epochs - epoch) / self._gamma
        return 1 / (1 + math.exp(power)) if power < 700 else 0.0  # exp overflows above 709
