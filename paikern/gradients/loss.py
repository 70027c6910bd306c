"""What the data-driven methods differentiate: one number from a model's outputs and its targets."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from paikern.batches import Batch
from paikern.errors import PaikernError

LossFunction = Callable[[Any, Any], Tensor]
LOSSES = ("cross_entropy", "nll_logits", "mse")


@dataclass(frozen=True)
class Loss:
    """Outputs and a batch -> a scalar; see `make_loss`.

    `name` is a word of `LOSSES`, "own" for a function given by the caller, or None to take what
    the outputs and the targets ask for. Class scores are divided by `temperature` first.
    """

    name: str | None = None
    function: LossFunction | None = None
    temperature: float = 1.0

    def __call__(self, outputs: Any, batch: Batch, place: str = "") -> Tensor:
        """The loss of one batch, a scalar; `place` is for messages (" on batch 3 of 'snip'").

        Raises:
            ValueError: no labels, labels out of range, outputs that no loss fits, a function that
                raises an error (it is the cause) or returns anything but one floating-point number.
        """
        loss = self._of(outputs, batch, place)
        if not isinstance(loss, Tensor):
            kind = "None" if loss is None else type(loss).__name__
            raise ValueError(
                f"loss_fn must return one number, got {kind}{place}; return a tensor computed from "
                "the outputs, without .item()"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"loss_fn must return one number, got {list(loss.shape)}{place}; add .mean()"
            )
        if not loss.is_floating_point():
            fix = "counts and accuracies have no gradient, return a loss of the outputs"
            raise ValueError(
                f"loss_fn must return one number of a floating-point dtype, got {loss.dtype}"
                f"{place}; {'return its .real or .abs()' if loss.is_complex() else fix}"
            )
        return loss.reshape(())

    def _of(self, outputs: Any, batch: Batch, place: str) -> Any:
        if self.function is not None:
            outputs = self._cooled_within(outputs)
            with _named(place):
                return self.function(outputs, _targets(batch))
        if self.name is None and _own_loss(outputs) is not None and self.temperature == 1.0:
            return _own_loss(outputs)
        logits, targets = _logits(outputs), batch.targets
        if targets is None:
            raise ValueError(
                "data: the loss needs labels; pass data=(inputs, labels), a loader that gives "
                "both, or loss_fn= that needs none"
            )
        if not isinstance(targets, Tensor):
            raise ValueError(
                f"data: labels must be a tensor, got {type(targets).__name__}; pass loss_fn= for "
                "any other form"
            )
        for what, given in (("outputs of the model", logits), ("labels", targets)):
            if given.is_complex():
                raise ValueError(
                    f"loss_fn: the {what} are {given.dtype}{place}, of which no loss is known; "
                    "pass loss_fn=, a function that returns a real number"
                )
        name = self.name or ("mse" if targets.is_floating_point() else "cross_entropy")
        if name == "mse":
            return F.mse_loss(self._cooled(logits), _values(logits, targets))
        if name == "cross_entropy" and targets.is_floating_point():
            return F.cross_entropy(self._cooled(logits), _values(logits, targets))
        if _is_language_model(outputs, batch, logits):
            logits, targets = logits[:, :-1], targets[:, 1:]
        scores, labels = _classes(logits, targets)
        measure = F.cross_entropy if name == "cross_entropy" else F.nll_loss
        return measure(self._cooled(scores), labels)

    def _cooled(self, outputs: Any) -> Any:
        if self.temperature == 1.0:
            return outputs
        return _logits(outputs) / self.temperature

    def _cooled_within(self, outputs: Any) -> Any:
        """What the model returns, in its own form, for a function that knows that form."""
        if self.temperature == 1.0:
            return outputs

        def cooled(value: Any) -> Any:
            return value / self.temperature if _is_scores(value) else value

        if isinstance(outputs, Mapping) and "logits" in outputs:
            entries: Any = copy.copy(outputs)
            entries["logits"] = cooled(outputs["logits"])
            return entries
        if any(_is_scores(leaf) for leaf in pytree.tree_leaves(outputs)):
            return pytree.tree_map(cooled, outputs)
        if isinstance(getattr(outputs, "logits", None), Tensor):
            attributes: Any = copy.copy(outputs)
            attributes.logits = cooled(outputs.logits)
            return attributes
        return self._cooled(outputs)


def make_loss(loss_fn: str | LossFunction | None = None, temperature: float = 1.0) -> Loss:
    """`loss_fn=` of `pk.prune` as a `Loss`.

    Args:
        loss_fn: None takes the model's own loss where it returns one (transformers), cross-entropy
            for integer labels and the mean squared error for float ones. "cross_entropy" (of class
            numbers, or of float targets as probabilities), "nll_logits" (the mean of -logit of the
            label, as several published codes have it) and "mse" name one. A function is called as
            `loss_fn(outputs, targets)`; of a batch of keyword inputs without labels it gets the
            batch as targets.
        temperature: the outputs are divided by it before the loss; where they come in a container,
            its logits, or else every floating-point tensor in it.

    Raises:
        ValueError: an unknown name, or a temperature that is not above 0.

    Example:
        >>> import torch
        >>> from paikern.batches import Batch
        >>> loss = make_loss("nll_logits")
        >>> loss(torch.tensor([[3.0, 1.0]]), Batch(torch.ones(1, 2), torch.tensor([0]))).item()
        -3.0
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if callable(loss_fn):
        return Loss("own", loss_fn, temperature)
    if loss_fn is not None and loss_fn not in LOSSES:
        raise ValueError(f"loss_fn must be a function or one of {LOSSES}, got {loss_fn!r}")
    return Loss(loss_fn, None, temperature)


@contextlib.contextmanager
def _named(place: str) -> Iterator[None]:
    """Whatever goes wrong in the caller's function, in one line that says where."""
    try:
        yield
    except (PaikernError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(
            f"loss_fn: it raised {type(error).__name__}{place}: {first}; it is called as "
            "loss_fn(outputs, labels)"
        ) from error


def _own_loss(outputs: Any) -> Any:
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _targets(batch: Batch) -> Any:
    if batch.targets is None and isinstance(batch.inputs, Mapping):
        return batch.inputs
    return batch.targets


def _is_scores(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _logits(outputs: Any) -> Tensor:
    found = outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif not isinstance(outputs, Tensor):
        found = getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            f"loss_fn: the model returns {type(outputs).__name__}, in which no class scores were "
            "found; pass loss_fn=, a function of outputs and targets"
        )
    return found


def _values(logits: Tensor, targets: Tensor) -> Tensor:
    """Float targets in the shape of the outputs."""
    if targets.numel() != logits.numel():
        fix = "pass one number for each output, or loss_fn="
        if targets.shape == logits.shape[:-1]:
            fix = "class numbers have to be integers, labels.long()"
        raise ValueError(
            f"data: targets of shape {list(targets.shape)} do not fit the model's outputs of shape "
            f"{list(logits.shape)}; {fix}"
        )
    return targets.reshape(logits.shape).to(logits.dtype)


def _is_language_model(outputs: Any, batch: Batch, logits: Tensor) -> bool:
    """Whether the labels are the tokens themselves, so that each is that of the place before."""
    if not isinstance(batch.inputs, Mapping) or "CausalLM" not in type(outputs).__name__:
        return False
    tokens = batch.inputs.get("input_ids")
    return tokens is not None and logits.dim() == 3 and batch.targets.shape == tokens.shape


def _classes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `[n, classes]` and labels `[n]`, checked before anything is differentiated."""
    labels = targets.long()
    if logits.dim() == labels.dim() + 1 and logits.shape[:-1] == labels.shape:
        scores, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    elif logits.dim() == labels.dim() + 1 and logits.shape[0] == labels.shape[0]:
        scores = logits.movedim(1, -1).reshape(-1, logits.shape[1])  # [n, classes, *size]
        labels = labels.reshape(-1)
    else:
        raise ValueError(
            f"data: labels of shape {list(targets.shape)} do not fit the model's outputs of shape "
            f"{list(logits.shape)}; pass one class number a sample, or loss_fn="
        )
    known = labels[labels != -100]
    if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < scores.shape[-1]:
        raise ValueError(
            f"data: labels run from {int(known.min())} to {int(known.max())}, but the model has "
            f"{scores.shape[-1]} outputs; class numbers start at 0"
        )
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores, labels
