"""Gate Decorators: ticks remove a few channels each, and the training between them is the tock.

A tick adds up `|gate * dL_b / dgate|` over the batches of `data`, the gates being those of batch
norm, with all other weights as they are, and removes the channels with the lowest sums. At the end
of every tock several ticks follow each other, each on the network that the one before has left. In
the tocks every step adds `penalty * sign(gamma)` to the gradient of gamma.

With `gate_lr` the gates are trained in a tick, by a step of plain SGD after each batch, and written
back in the end: gamma = gate, beta = gate * beta'.

Source: You et al. 2019, "Gate Decorator" (arXiv:1909.08174), section 3. A tock has a learning rate
of its own there; here it is the caller's loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paikern.channel_rounds import channel_metadata, run_channel_rounds
from paikern.errors import PaikernWarning
from paikern.masks import MaskSet
from paikern.preparation import packed_of, prepare_run
from paikern.scorers.base import Run
from paikern.scorers.gate_decorators import GateDecorators
from paikern.training.base import Event, Pruner, check_finite
from paikern.training.once import seeded_reading
from paikern.training.penalty import NormPenalty, batch_norm_scales
from paikern.training.ranks import agreed, agreed_tensors
from paikern.training.registry import register_pruner


@dataclass
class _Tick(GateDecorators):
    """The method, with gates that are trained while it scores; those of frozen norms are not."""

    gate_lr: float = 0.0

    def train_gates(
        self, run: Run, gates: Mapping[str, Tensor], slopes: Mapping[str, Tensor]
    ) -> None:
        if self.gate_lr:
            for path, slope in slopes.items():
                if run.model.get_parameter(f"{path}.weight").requires_grad:
                    gates[path].sub_(slope, alpha=self.gate_lr)


@register_pruner("gate_decorators")
class TickTock(Pruner):
    """Channels by `|gate * dL / dgate|`, a few with each tick, with training in between.

    `sparsity` is a fraction of the channels, or of the weights with target "weights".

    Args:
        tock: epochs of training between ticks.
        ticks: how many ticks follow each other at the end of a tock.
        fraction: of what is left, removed by a tick; the last one stops at the sparsity exactly.
            None for the fraction with which the last tick reaches it.
        last_update: no ticks after this epoch; None for half of the epochs, or the first tock.
        minimal_ratio, eta: as in the method `gate_decorators` of `pk.prune`.
        penalty: L1 subgradient on gamma in the tocks, until the last tick; 0 for none.
        gate_lr: learning rate of the gates in a tick; with 0 a tick changes nothing but the masks.
        batches, batch_size, mode, target: as in the method.

    After t ticks exactly `n - floor((1 - (1 - fraction)**t) n)` of n outputs of layers are kept,
    or the next lower number that the channels which are left can make up.
    """

    tock: int = 1
    ticks: int = 10
    fraction: float | None = None
    last_update: int | None = None
    minimal_ratio: float = 0.1
    eta: float = 0.0
    penalty: float = 1e-5
    gate_lr: float = 0.0
    batches: int | None = None
    batch_size: int = 128
    mode: str = "train"
    target: str = "nodes"

    summary = "channels whose batch-norm gate changes the loss, a few per tick, training between"
    source = "You et al. 2019"
    needs_data = True
    takes_loss = True

    def begin(self) -> None:
        self._scorer = _Tick(
            minimal_ratio=self.minimal_ratio,
            eta=self.eta,
            batches=self.batches,
            batch_size=self.batch_size,
            mode=self.mode,
            target=self.target,
            gate_lr=self.gate_lr,
        )
        if not 0 <= self.gate_lr < math.inf:
            raise ValueError(f"gate_lr must be >= 0 and finite, got {self.gate_lr}")
        for name in ("tock", "ticks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"fraction must be in (0, 1), got {self.fraction}")
        epochs = self.settings.epochs
        if self.last_update is not None and not 1 <= self.last_update <= epochs:
            raise ValueError(f"last_update must be in [1, {epochs}], got {self.last_update}")
        self._last = self.last_update or min(max(self.tock, epochs // 2), epochs)
        if self._last < self.tock:
            raise ValueError(
                f"tock={self.tock}: the first tick comes after so many epochs, but the last one "
                f"that may have ticks is {self._last}; use a shorter tock"
            )
        if not batch_norm_scales(self.model):
            raise ValueError(
                f"model: {type(self.model).__name__} has no batch norm with weights, by which "
                "channels are chosen; use earlycrop_s"
            )
        self._penalty = NormPenalty(self.model, self.settings.optimizers, self.penalty)
        self._done = 0  # ticks
        self._told: set[str] = set()
        self._penalty.hold()

    def epoch_end(self, model: nn.Module, epoch: int, data: Any) -> Event:
        if self._over(self.epoch):
            return self.event(epoch, f"masks are final, after {self._done} ticks")
        if epoch % self.tock:
            return self.event(epoch, f"a tock, {self.tock - epoch % self.tock} epochs from a tick")
        check_finite(self.weights(model), f"epoch {epoch}")
        fractions = self._fractions()
        with seeded_reading(data, self.settings.seed):
            masks, run = self._ticked(model, data, fractions, epoch)
        masks, trained = agreed(masks), agreed_tensors(run.cache["gates"] if self.gate_lr else {})
        check_finite(trained, f"epoch {epoch}, gates trained with gate_lr={self.gate_lr}")
        for note in dict.fromkeys(run.notes):
            if note not in self._told:
                warnings.warn(note, PaikernWarning, stacklevel=3)
        self._told |= set(run.notes)
        self.set_masks(model, masks)
        _write_gates(run, trained)
        self._done += len(fractions)
        if self._over(epoch):
            self._penalty.let_go()
        reason = f"{len(fractions)} ticks, {self._done} in all"
        if self._over(epoch) and not self._reached():
            reason += (
                f"; they end short of sparsity={self.sparsity}, which more ticks, a larger "
                "fraction or a later last_update reach"
            )
        values = {"ticks": float(self._done), "node_sparsity": masks.node_sparsity}
        return self.event(epoch, reason, pruned=True, values=values)

    def remove(self) -> None:
        super().remove()
        self._penalty.let_go()

    def progress(self) -> dict[str, Any]:
        return {"ticks": self._done, "told": sorted(self._told)}

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._done, self._told = int(progress["ticks"]), set(progress["told"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if self._over(self.epoch):
            self._penalty.let_go()
        else:
            self._penalty.hold()

    def _density(self, ticks: int) -> float:
        """What is left after so many ticks."""
        final = 1.0 - self.sparsity
        if self.fraction is not None:
            return max(final, (1.0 - self.fraction) ** ticks)
        total = self.ticks * (self._last // self.tock)
        return final ** (min(ticks, total) / total)

    def _reached(self) -> bool:
        return self._density(self._done) <= 1.0 - self.sparsity

    def _over(self, epoch: int) -> bool:
        """Whether no tick comes after `epoch` epochs."""
        return self._reached() or epoch // self.tock >= self._last // self.tock

    def _fractions(self) -> list[float]:
        """The fraction that is gone after each tick of this epoch."""
        final, found = 1.0 - self.sparsity, []
        for tick in range(self._done + 1, self._done + self.ticks + 1):
            density = self._density(tick)
            found.append(self.sparsity if density <= final else 1.0 - density)
            if density <= final:
                break
        return found

    def _ticked(
        self, model: nn.Module, data: Any, fractions: list[float], epoch: int
    ) -> tuple[MaskSet, Run]:
        given, before = self.settings, self.masks
        run = prepare_run(
            model, self._scorer, given.example_inputs, given.ignore, given.include, given.seed,
            "paper", data, given.loss_fn,
        )  # fmt: skip
        if self._done:
            run.masks = packed_of(before, model)
        packed, rounds = run_channel_rounds(
            run,
            self._scorer,
            fractions,
            "global",
            given.on_collapse,
            None,
            channels=before.channels if self._done else None,
            final=fractions[-1] == self.sparsity,
        )
        history = [{"tick": self._done + row.pop("round"), "epoch": epoch, **row} for row in rounds]
        metadata = {
            **self.provenance(epoch=epoch, history=before.metadata.get("history", []) + history),
            **channel_metadata(run),
        }
        return MaskSet({name: packed[name] for name in self.shapes}, self.shapes, metadata), run


@torch.no_grad()
def _write_gates(run: Run, gates: Mapping[str, Tensor]) -> None:
    for path, gate in gates.items():
        weight = run.model.get_parameter(f"{path}.weight")
        if weight.requires_grad:
            weight.copy_(gate)
            shifts: dict[str, Tensor] = run.cache["gate_shifts"]
            if path in shifts:
                shift = shifts[path]
                run.model.get_parameter(f"{path}.bias").copy_(gate.to(shift.device) * shift)
