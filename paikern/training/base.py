"""What prunes during training: one object, called at the end of every epoch.

A method is a class with documented options, found by name, as scorers are. It says what an epoch's
end has brought with an `Event`, keeps its masks applied while the optimizer steps, and can be
stored in a checkpoint and go on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform

from paikern import budget, ops
from paikern._attach import AttachedMasks, plain_optimizer
from paikern.errors import MaskFormatError, NonFiniteScoreError
from paikern.masks import MaskSet
from paikern.prunable import prunable_parameters, unwrap
from paikern.training import _statefile


@dataclass(frozen=True)
class Event:
    """What the end of an epoch has brought.

    Args:
        epoch: how many epochs have ended.
        reason: what happened and why, one line.
        kept, total: weights kept now, of so many.
        pruned: the masks have changed.
        rewound: weights, optimizer and schedule were put back; training starts over.
        stop: the method needs no more training.
        values: what the method measured: "distance", "level", ...
    """

    epoch: int
    reason: str
    kept: int
    total: int
    pruned: bool = False
    rewound: bool = False
    stop: bool = False
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is removed now."""
        return 1.0 - self.kept / self.total


@dataclass(frozen=True)
class Settings:
    """What `pk.pruner` is given besides the method's own options."""

    sparsity: float | None
    epochs: int
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    schedulers: tuple[Any, ...] = ()
    data: Any = None
    loss_fn: str | Callable[[Any, Any], Tensor] | None = None
    example_inputs: Any = None
    ignore: Any = ()
    include: Any = None
    seed: int = 0
    on_collapse: str = "warn"


@dataclass_transform()
@dataclass(eq=False)
class Pruner:
    """Base class; `pk.pruner` makes one. Subclasses implement `begin`, `epoch_end` and the state.

    name: as given to `pk.pruner`. summary, source: one line each for the table of methods.
    needs_data: the method reads samples when it prunes.
    takes_loss: the method uses `loss_fn`; where one is given to any other it is refused.
    needs_sparsity: there is no other option that says how much is removed.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs_data: ClassVar[bool] = False
    takes_loss: ClassVar[bool] = False
    needs_sparsity: ClassVar[bool] = True

    # --- what subclasses implement ---------------------------------------------------------------

    def begin(self) -> None:
        """Check the options against the settings and remember what the method needs."""

    def epoch_end(self, model: nn.Module, epoch: int, data: Any) -> Event:
        """What happens when `epoch` epochs have ended. An error leaves everything as it was."""
        raise TypeError(f"{type(self).__name__} must implement epoch_end()")

    def progress(self) -> dict[str, Any]:
        """Numbers and words of the state beyond epoch and masks."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the state beyond the masks."""
        return {}

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Take over what `progress` and `tensors` gave."""

    def restart(self) -> None:
        """Start optimizers and schedules again; only methods that rewind do anything."""

    # --- what everybody calls --------------------------------------------------------------------

    def start(self, model: nn.Module, settings: Settings) -> None:
        """Called once, by `pk.pruner`, before training."""
        self.settings = settings
        self.model = unwrap(model)
        self.layers = prunable_parameters(self.model, settings.ignore or (), settings.include)
        self.shapes = {name: layer.shape for name, layer in self.layers.items()}
        self.total = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        self.epoch = 0
        self._handles: list[AttachedMasks] = []
        ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in self.shapes.items()}
        self._masks = MaskSet({n: ops.pack_mask(mask) for n, mask in ones.items()}, self.shapes)
        for name, weight in self.weights(self.model).items():
            if weight.is_meta:
                raise ValueError(
                    f"{name} is on the meta device and holds no values; load the weights first"
                )
        self._masked = self._holders()
        self.begin()

    @property
    def masks(self) -> MaskSet:
        """The masks as they are now; all of them ones before the first pruning."""
        return self._masks

    def on_epoch_end(self, model: nn.Module | None = None, *, data: Any = None) -> Event:
        """Tell the pruner that an epoch of training has ended.

        Call it after the learning-rate schedule has stepped, before the epoch is saved.

        Args:
            model: the model, wrapped or not; the one that the pruner was made for by default.
            data: samples for methods that read some, in place of those given to `pk.pruner`.

        Returns:
            What happened: an `Event`. Where it is `rewound`, a schedule that the pruner was not
            given must be started again; where it says `stop`, training is over.

        Raises:
            MaskFormatError: another model.
            NonFiniteScoreError: NaN or infinite weights; names the parameter and the epoch.
            SparsityError: what `on_collapse="raise"` forbids.
            After an error weights, masks and state are as they were.
        """
        inner = self.model if model is None else unwrap(model)
        self._masks.slots(inner)
        event = self.epoch_end(inner, self.epoch + 1, self.settings.data if data is None else data)
        self.epoch += 1
        return event

    def remove(self) -> None:
        """Stop keeping the masks applied; the weights stay as they are."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint: numbers and words, and tensors by name under "tensors".

        The weights and the optimizer are not in it: they have state dicts of their own.
        """
        packed = {f"mask/{name}": self._masks.packed(name) for name in self._masks}
        return {
            "format": _statefile.FORMAT,
            "version": _statefile.VERSION,
            "pruner": self.name,
            "settings": self._identity(),
            "epoch": self.epoch,
            "progress": _plain(self.progress()),
            "metadata": _plain(self._masks.metadata),
            "tensors": {**packed, **self.tensors()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the masks are applied to the model again.

        The pruner must have been made with the same method, sparsity, epochs and options.

        Raises:
            ValueError: no state of this method, or of other options (they are named).
            MaskFormatError: masks of another model.
            After an error nothing has changed.
        """
        _statefile.check(state, self.name, self._identity())
        tensors: dict[str, Tensor] = state["tensors"]
        found = {n: tensors[f"mask/{n}"] for n in self.shapes if f"mask/{n}" in tensors}
        stored = {key for key in tensors if key.startswith("mask/")}
        if stored != {f"mask/{name}" for name in self.shapes}:
            other = sorted(stored ^ {f"mask/{name}" for name in self.shapes})[0].removeprefix(
                "mask/"
            )
            raise MaskFormatError(
                f"the state belongs to another model: only one of the two has {other!r}"
            )
        try:
            masks = MaskSet(found, self.shapes, state["metadata"])
        except ValueError as error:
            raise MaskFormatError(f"the state belongs to another model: {error}") from None
        self.restore(state["progress"], tensors)
        self.epoch = int(state["epoch"])
        self.set_masks(self.model, masks)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as a safetensors file, whole or not at all."""
        _statefile.save_state(self.state_dict(), path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that `save` wrote. Raises as `load_state_dict` does.

        Raises:
            MaskFormatError: the file is missing or no state.
        """
        self.load_state_dict(_statefile.load_state(path))

    # --- what subclasses use ---------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """The sparsity in the end."""
        assert self.settings.sparsity is not None
        return self.settings.sparsity

    @property
    def final_count(self) -> int:
        """Weights kept in the end."""
        return budget.keep_count(self.total, self.sparsity)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The prunable weights of `model` as they are now."""
        return {name: slot.tensor.detach() for name, slot in self._masks.slots(model).items()}

    def event(self, epoch: int, reason: str, **more: Any) -> Event:
        return Event(epoch, reason, self._masks.kept, self.total, **more)

    def set_masks(self, model: nn.Module, masks: MaskSet) -> None:
        """Zero what `masks` prune, now and after every step of the optimizers."""
        self._detach()
        self._masks = masks
        if masks.kept == masks.total:
            return
        if not self._masked:
            masks.apply(model)
        self._handles = [masks.attach(model, optimizer) for optimizer in self._masked]

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Metadata of masks that the method has made."""
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "method": self.name,
            "arguments": {"epochs": self.settings.epochs, **arguments},
            "seed": self.settings.seed,
            "sparsity": self.settings.sparsity,
            "model": type(self.model).__name__,
            **more,
        }

    def _holders(self) -> list[torch.optim.Optimizer]:
        """The optimizers that hold prunable weights; refused now and not after the first epoch."""
        optimizers = self.settings.optimizers
        weights = {id(slot.tensor) for slot in self._masks.slots(self.model).values()}
        found = [
            optimizer
            for optimizer in optimizers
            if any(id(p) in weights for group in optimizer.param_groups for p in group["params"])
        ]
        for optimizer in found or optimizers:
            self._masks.attach(self.model, optimizer).remove()
        return found

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a state to be taken over."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        common = {"sparsity": self.settings.sparsity, "epochs": self.settings.epochs}
        return _plain({**common, **options})


def check_finite(weights: Mapping[str, Tensor], when: str) -> None:
    """Refuse NaN and infinite weights, naming the first parameter that holds some."""
    for name, weight in weights.items():
        # The sum is one read without a temporary; it may only overflow where nothing is wrong.
        if weight.numel() and not torch.isfinite(weight.sum()):
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise NonFiniteScoreError(
                    f"{when}: {name} holds {bad} NaN or infinite weights; go back to an earlier "
                    "checkpoint and train with a lower learning rate"
                )


def as_optimizers(given: Any) -> tuple[torch.optim.Optimizer, ...]:
    """One optimizer or several, out of their wrappers."""
    if given is None:
        return ()
    several = given if isinstance(given, Sequence) else [given]
    return tuple(plain_optimizer(one, "pruner") for one in several)


def as_schedulers(given: Any) -> tuple[Any, ...]:
    """One learning-rate schedule or several; out of Accelerate's wrapper."""
    several: Iterable[Any] = (
        () if given is None else given if isinstance(given, Sequence) else [given]
    )
    found = tuple(getattr(one, "scheduler", one) for one in several)
    for one in found:
        if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
            raise TypeError(
                f"scheduler: give a torch learning-rate scheduler, got {type(one).__name__}"
            )
    return found


def _plain(value: Any) -> Any:
    """The same as JSON can hold it."""
    return json.loads(json.dumps(value, default=str))
