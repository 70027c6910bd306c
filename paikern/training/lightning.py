"""Any pruner as a callback of Lightning's `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from paikern.training.base import Event, Pruner
from paikern.training.registry import pruner, pruner_class
from paikern.training.trainer_data import callback_class, defaults

_Callback: Any
_Callback, _wrong = callback_class(  # the second is the older name
    "Callback", "lightning.pytorch", "pytorch_lightning"
)


class LightningPruner(_Callback):
    """`pk.pruner(name, ...)` at the end of every training epoch.

    Args:
        name, **options: as in `pk.pruner`. The optimizers, the schedules and, unless given,
            `epochs` (`max_epochs`) come from the trainer; so do `data` (the training loader) and
            `example_inputs` (the module's `example_input_array`) where the method needs them.
        log: log "sparsity" and what the method measures.

    `pruner` is the pruner once training has started, `event` what the last epoch has brought.
    Masks and state are in the trainer's checkpoints. Write them at the end of the epoch,
    `ModelCheckpoint(save_on_train_epoch_end=True)`: a checkpoint from the validation before it does
    not know what the epoch has brought, and is refused. Where the method says stop, so does the
    trainer.

    Raises:
        ImportError: Lightning is not installed, or cannot be imported, for the reason it gives.
        ValueError: an unknown name.

    Example:
        >>> from paikern.training.lightning import LightningPruner
        >>> callback = LightningPruner("asni", sparsity=0.9)
        >>> # lightning.Trainer(max_epochs=30, callbacks=[callback]).fit(module, loader)
    """

    def __init__(self, name: str, *, log: bool = True, **options: Any) -> None:
        if _Callback is object:
            raise ImportError(
                f"LightningPruner needs Lightning, which {_wrong}; pip install 'paikern[lightning]'"
            )
        super().__init__()
        pruner_class(name)
        self.name, self.options, self.log = name, options, log
        self.pruner: Pruner | None = None
        self.event: Event | None = None
        self._stored: Mapping[str, Any] | None = None
        self._rewound = False

    @property
    def state_key(self) -> str:
        return f"paikern.{self.name}"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the pruner: optimizers exist, and have not loaded a state yet."""
        if self.pruner is not None:
            self.pruner.remove()
        given = defaults(
            self.name,
            self.options,
            _Loader(trainer),
            getattr(pl_module, "example_input_array", None),
        )
        if "epochs" not in given:
            if (trainer.max_epochs or -1) < 1:
                raise ValueError(
                    f"epochs: the trainer has max_epochs={trainer.max_epochs}; give epochs= to "
                    "LightningPruner"
                )
            given["epochs"] = trainer.max_epochs
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.pruner = pruner(
            self.name, pl_module, optimizer=trainer.optimizers, scheduler=schedulers, **given
        )
        if self._stored is not None:
            self.pruner.load_state_dict(self._stored)
            self._stored = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.pruner is not None
        if 0 < self.pruner.epoch != trainer.current_epoch:
            raise ValueError(
                f"the checkpoint has ended {trainer.current_epoch} epochs, its pruner "
                f"{self.pruner.epoch}; write checkpoints with "
                "ModelCheckpoint(save_on_train_epoch_end=True)"
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self._rewound and self.pruner is not None:
            self.pruner.restart()  # the trainer has stepped the schedules since the rewind
            self._rewound = False

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.pruner is not None
        self.event = self.pruner.on_epoch_end(pl_module)
        self._rewound = self.event.rewound
        if self.log:
            pl_module.log_dict({"sparsity": self.event.sparsity, **self.event.values})
        if self.event.stop:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict or None


class _Loader:
    """The training batches; the trainer has no loader yet when the pruner is made."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        return iter(self._trainer.train_dataloader)

    @property
    def generator(self) -> Any:
        return getattr(self._trainer.train_dataloader, "generator", None)

    @property
    def sampler(self) -> Any:
        return getattr(self._trainer.train_dataloader, "sampler", None)
