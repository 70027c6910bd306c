"""EarlyCroP: prune when the weights have stopped moving away, by the flow of the gradient.

Training in the lazy regime changes the gradient little, so that pruning for it is safe from there
on. The moment is found from the distance of the weights from a reference, and the score is that of
CroP: `crop` for single weights, `crop_s` for channels.

    "slides"     D_t = |W_t - W_0|^2 / |W_0|^2   first t >= 2 with |D_t - D_{t-1}| / D_1 < tolerance
    "published"  d_t = |W_t - W_1| / |W_1|       first t >= 3 with |d_t - d_{t-1}| < tau
                 tau = d_2 (1 - s), for channels d_2 min(1 - s - 0.1, 0.99)

W_t are the weights after epoch t, W_0 those before training, s the sparsity. Where the rule never
fires, `latest` prunes; for channels at s >= 0.9 the published tau is not positive, so it always is
`latest`.

Source: Rachwan et al. 2022 (arXiv:2206.10451): "slides" as in the authors' talk, which gives no
tolerance (0.05 is ours), "published" as in their code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from paikern.training.base import Event, check_finite
from paikern.training.drift import squared_distance, squared_norm
from paikern.training.once import PrunesOnce
from paikern.training.registry import register_pruner

RULES = ("slides", "published")
_PARAMETERS = ("prunable", "all")


@register_pruner("earlycrop_u")
class EarlyCroPU(PrunesOnce):
    """Single weights by `crop`, once the distance from the initial weights has settled.

    Args:
        method: the score; any name from `pk.methods()`.
        method_options: options of that method, and of `pk.prune`.
        rule: "slides" or "published".
        tolerance: of rule "slides".
        latest: the epoch that prunes whatever the rule says. Default: 100, as published, or half
            of the epochs where that is earlier.
        parameters: whose distance counts: "prunable" weights, or "all" as published.
    """

    method: str = "crop"
    rule: str = "slides"
    tolerance: float = 0.05
    latest: int | None = None
    parameters: str = "prunable"

    summary = "crop at the epoch in which the weights settle"
    source = "Rachwan et al. 2022"

    def begin(self) -> None:
        super().begin()
        epochs = self.settings.epochs
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {self.rule!r}")
        if self.parameters not in _PARAMETERS:
            raise ValueError(f"parameters must be one of {_PARAMETERS}, got {self.parameters!r}")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be > 0, got {self.tolerance}")
        if self.latest is not None and not 1 <= self.latest <= epochs:
            raise ValueError(f"latest must be in [1, {epochs}], got {self.latest}")
        self._latest = self.latest or min(100, max(1, epochs // 2))
        self.distances: list[float] = []
        self._reference: dict[str, Tensor] = {}
        self._reference_norm = 0.0
        if self.rule == "slides":
            self._refer_to(self.model, "the initial weights")

    @property
    def threshold(self) -> float | None:
        """What the change of the distance must fall below; None while it is not known."""
        if self.rule == "slides":
            return self.tolerance * self.distances[0] if self.distances else None
        return self.distances[1] * self._margin() if len(self.distances) > 1 else None

    def epoch_end(self, model: nn.Module, epoch: int, data: Any) -> Event:
        if self.pruned_at is not None:
            return self.over(epoch)
        before = self.distances
        held = self._reference, self._reference_norm
        try:
            return self._look(model, epoch, data)
        except BaseException:
            self.distances, (self._reference, self._reference_norm) = before, held
            raise

    def progress(self) -> dict[str, Any]:
        return {**super().progress(), "distances": self.distances, "norm": self._reference_norm}

    def tensors(self) -> dict[str, Tensor]:
        return {f"reference/{name}": value for name, value in self._reference.items()}

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().restore(progress, tensors)
        self.distances = list(progress["distances"])
        self._reference_norm = float(progress["norm"])
        watched = self._watched(self.model)  # a file has them in another order; sums depend on it
        self._reference = {
            name: tensors[f"reference/{name}"] for name in watched if f"reference/{name}" in tensors
        }

    def _look(self, model: nn.Module, epoch: int, data: Any) -> Event:
        weights = self._watched(model)
        check_finite(weights, f"epoch {epoch}")
        if self.rule == "published" and epoch == 1:
            self._refer_to(model, "the weights after epoch 1")
        square = squared_distance(weights, self._reference) / self._reference_norm
        distance = square if self.rule == "slides" else math.sqrt(square)
        self.distances = [*self.distances, distance]
        first = 1 if self.rule == "slides" else 2
        if epoch == first and distance == 0:
            raise ValueError(
                f"epoch {epoch}: no weight has moved, so there is no scale for its rest; check the "
                "learning rate and requires_grad"
            )
        values = {"distance": distance}
        limit = self.threshold
        if epoch > first and limit is not None:
            change = abs(distance - self.distances[-2])
            values |= {"change": change, "threshold": limit}
            if change < limit:
                why = f"the distance changed by {change:.3g}, less than {limit:.3g}"
                return self._prune(model, epoch, data, why, values)
        if epoch >= self._latest:
            why = f"epoch {epoch} is the latest, and the weights have not settled"
            return self._prune(model, epoch, data, why, values)
        return self.event(epoch, "the weights have not settled", values=values)

    def _prune(
        self, model: nn.Module, epoch: int, data: Any, why: str, values: dict[str, float]
    ) -> Event:
        event = self.prune_now(model, epoch, data, why, **values)
        self._reference = {}  # nobody will ask again
        return event

    def _margin(self) -> float:
        return 1 - self.sparsity

    def _watched(self, model: nn.Module) -> dict[str, Tensor]:
        if self.parameters == "prunable":
            return self.weights(model)
        return {name: p.detach() for name, p in model.named_parameters()}

    def _refer_to(self, model: nn.Module, what: str) -> None:
        self._reference = {n: w.clone() for n, w in self._watched(model).items()}
        self._reference_norm = squared_norm(self._reference)
        if not self._reference_norm > 0:
            raise ValueError(
                f"{what} are all 0 or NaN, and distances are relative to them; initialise the model"
            )


@register_pruner("earlycrop_s")
class EarlyCroPS(EarlyCroPU):
    """Whole channels by `crop_s`, once the distance from the initial weights has settled.

    `sparsity` is what `crop_s` takes it for: a fraction of the channels, or of the weights with
    `method_options={"target": "weights"}`.

    Args:
        method, method_options, rule, tolerance, latest, parameters: as in `earlycrop_u`.
    """

    method: str = "crop_s"

    summary = "crop_s, channels, at the epoch in which the weights settle"
    source = "Rachwan et al. 2022"

    def _margin(self) -> float:
        return min(1 - self.sparsity - 0.1, 0.99)
