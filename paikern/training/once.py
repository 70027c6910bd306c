"""Methods that prune once, by any method of `pk.prune`, at a moment during training."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from paikern.api import prune
from paikern.masks import MaskSet
from paikern.scorers.base import check_loss, make_scorer, scorer_class
from paikern.training.base import Event, Pruner, check_finite
from paikern.training.ranks import agreed
from paikern.training.registry import register_pruner

_GIVEN = {"sparsity", "density", "amount", "compression", "data", "loss_fn", "example_inputs"}
_GIVEN |= {"model", "method", "method_options", "ignore", "include", "seed", "on_collapse", "apply"}


@dataclass(eq=False)
class PrunesOnce(Pruner):
    """Base of the methods that call `pk.prune` once; `prune_now` does it.

    Args:
        method: a name from `pk.methods()`.
        method_options: options of that method, and of `pk.prune` (`rounds`, `scope`, ...).
    """

    method: str = "magnitude"
    method_options: Mapping[str, Any] = field(default_factory=dict)

    takes_loss: ClassVar[bool] = True  # where the method does, see `begin`

    def begin(self) -> None:
        cls = scorer_class(self.method)
        known = set(inspect.signature(prune).parameters) - _GIVEN
        for key in _GIVEN & set(self.method_options):
            raise ValueError(f"method_options: give {key} to pk.pruner itself")
        make_scorer(self.method, {k: v for k, v in self.method_options.items() if k not in known})
        settings = self.settings
        check_loss("method", cls.name, cls.takes_loss, settings.loss_fn)
        if cls.needs_data and settings.data is None:
            raise ValueError(
                f"data: method {self.method!r} reads samples; pass data=, the training loader for "
                "instance"
            )
        if cls.needs_inputs and settings.data is None and settings.example_inputs is None:
            raise ValueError(
                f"example_inputs: method {self.method!r} traces the model and needs one input, for "
                "instance example_inputs=torch.ones(1, 3, 32, 32)"
            )
        self.pruned_at: int | None = None

    def prune_now(
        self, model: nn.Module, epoch: int, data: Any, why: str, **values: float
    ) -> Event:
        """Prune with `method`, once and for all; `why` goes into the event."""
        settings = self.settings
        check_finite(self.weights(model), f"epoch {epoch}")
        with seeded_reading(data, settings.seed):
            found = prune(
                model,
                self.method,
                sparsity=self.sparsity,
                data=data,
                loss_fn=settings.loss_fn,
                example_inputs=settings.example_inputs,
                ignore=settings.ignore,
                include=settings.include,
                seed=settings.seed,
                on_collapse=settings.on_collapse,
                apply=False,
                **self.method_options,
            )
        metadata = {**found.metadata, "pruner": self.name, "epoch": epoch}
        packed = {name: found.packed(name) for name in self.shapes}
        self.set_masks(model, agreed(MaskSet(packed, self.shapes, metadata)))
        self.pruned_at = epoch
        return self.event(epoch, f"pruned by {self.method}: {why}", pruned=True, values=values)

    def over(self, epoch: int) -> Event:
        return self.event(epoch, f"masks are final since epoch {self.pruned_at}")

    def progress(self) -> dict[str, Any]:
        return {"pruned_at": self.pruned_at}

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        self.pruned_at = progress["pruned_at"]


@contextlib.contextmanager
def seeded_reading(data: Any, seed: int) -> Iterator[None]:
    """A loader that shuffles draws from torch's generator, or from one of its own: both start from
    `seed` and go on afterwards as if nothing had been drawn."""
    samplers = [getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[1], "sampler", None))
    own = [getattr(holder, "generator", None) for holder in (data, *samplers)]
    held = [(g, g.get_state()) for g in own if isinstance(g, torch.Generator)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for generator, _ in held:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in held:
                generator.set_state(state)


@register_pruner("one_shot")
class OneShot(PrunesOnce):
    """Prune once, with any method of `pk.prune`, when `at` epochs have ended.

    Args:
        method: a name from `pk.methods()`.
        method_options: options of that method, and of `pk.prune` (`rounds`, `scope`, ...).
        at: after how many epochs, in [1, epochs].
    """

    at: int = 1

    summary = "any method of pk.prune at a chosen epoch"
    source = "the method's own"

    def begin(self) -> None:
        super().begin()
        if not 1 <= self.at <= self.settings.epochs:
            raise ValueError(f"at must be in [1, {self.settings.epochs}], got {self.at}")

    def epoch_end(self, model: nn.Module, epoch: int, data: Any) -> Event:
        if self.pruned_at is not None:
            return self.over(epoch)
        if epoch < self.at:
            return self.event(epoch, f"waits for epoch {self.at}")
        return self.prune_now(model, epoch, data, f"epoch {epoch} has ended")
