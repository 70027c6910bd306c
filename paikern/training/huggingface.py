"""Any pruner as a callback of the Hugging Face `Trainer`."""

from __future__ import annotations

import os
from typing import Any

from paikern.training.base import Event, Pruner
from paikern.training.registry import pruner, pruner_class
from paikern.training.trainer_data import callback_class, defaults

_Callback: Any
_Callback, _wrong = callback_class("TrainerCallback", "transformers")

FILE = "paikern_pruner.safetensors"


class HFPruner(_Callback):
    """`pk.pruner(name, ...)` at the end of every epoch of `transformers.Trainer`.

    Args:
        name, **options: as in `pk.pruner`. Optimizer, schedule and, unless given, `epochs` come
            from the trainer; so does `data` (the training loader) where the method needs some. The
            model's own loss counts unless `loss_fn` is given.
        resume_from: folder of the checkpoint that training goes on from, where it is not the one
            that the trainer would have written (`output_dir/checkpoint-STEP`).

    `pruner` is the pruner once training has started, `event` what the last epoch has brought. The
    state is stored in each checkpoint's folder as `paikern_pruner.safetensors`; use
    `save_strategy="epoch"`. `save_pretrained` writes the pruned weights as zeros, its keys do not
    change; save the masks with `callback.pruner.masks.save(path)`.

    Raises:
        ImportError: transformers is not installed, or cannot be imported, for the reason it gives.
        ValueError: an unknown name; a checkpoint without the state of a pruner.

    Example:
        >>> from paikern.training.huggingface import HFPruner
        >>> callback = HFPruner("asni", sparsity=0.5)
        >>> # transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(self, name: str, *, resume_from: str | None = None, **options: Any) -> None:
        if _Callback is object:
            raise ImportError(
                f"HFPruner needs transformers, which {_wrong}; pip install transformers"
            )
        super().__init__()
        pruner_class(name)
        self.name, self.options, self.resume_from = name, options, resume_from
        self.pruner: Pruner | None = None
        self.event: Event | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pruner is not None:
            self.pruner.remove()
        given = defaults(self.name, self.options, kwargs.get("train_dataloader"))
        given.setdefault("epochs", max(1, state.num_train_epochs))
        self.pruner = pruner(
            self.name,
            kwargs["model"],
            optimizer=kwargs.get("optimizer"),
            scheduler=kwargs.get("lr_scheduler"),
            **given,
        )
        if state.global_step > 0:
            path = os.path.join(self.resume_from or _folder(args, state), FILE)
            if not os.path.exists(path):
                raise ValueError(
                    f"training goes on at step {state.global_step}, but there is no {path!r}; "
                    "give the checkpoint's folder as resume_from="
                )
            self.pruner.load(path)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        self.event = self.pruner.on_epoch_end(kwargs["model"])
        if self.event.stop:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pruner is not None and state.is_world_process_zero:
            self.pruner.save(os.path.join(_folder(args, state), FILE))


def _folder(args: Any, state: Any) -> str:
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
