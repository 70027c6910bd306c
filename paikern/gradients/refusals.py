"""What can go wrong inside a model that is differentiated, in one line that names the place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from paikern._inputs import fix_for
from paikern.batches import Batch
from paikern.errors import NonFiniteScoreError, PaikernError


@contextlib.contextmanager
def refused_by(model: nn.Module, batch: Batch) -> Iterator[None]:
    """An error of a forward pass as one that names the layer, the shapes of the batch, and a fix.

    Raises:
        ValueError: in place of an IndexError, RuntimeError, TypeError or ValueError of the model;
            lack of memory and paikern's own errors pass unchanged.
    """
    try:
        yield
    except (PaikernError, torch.OutOfMemoryError):
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(batch.inputs, Mapping) and "unexpected keyword argument" in first:
            fix = "; a mapping holds what forward takes by name, give labels as ({...}, labels)"
        else:
            fix = fix_for(model, batch.inputs)
        raise ValueError(
            f"data: the model does not take a batch of {_shapes(batch)}: "
            f"{_layer(model, error.__traceback__)}: {first}{fix}"
        ) from error


@contextlib.contextmanager
def named_derivatives(place: str = "") -> Iterator[None]:
    """A missing derivative as an error that names the operation and a way out.

    `place` says in which backward pass (" of batch 3 in method 'snip'").

    Raises:
        PaikernError: in place of the RuntimeError that PyTorch raises then; lack of memory passes
            unchanged.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        text = str(error)
        if "derivative" in text or "double backward" in text:
            raise _underivable(text) from error
        first = (text.strip() or type(error).__name__).splitlines()[0]
        raise PaikernError(
            f"the backward pass{place} failed: {first}; look at loss_fn and the model for tensors "
            "of an earlier batch or changes in place"
        ) from error


def refuse_once_differentiable(value: Tensor) -> None:
    """Raise PaikernError where a function in the graph of `value` has a first derivative only.

    PyTorch leaves such a branch out in silence when derivatives are taken by given inputs.
    """
    seen, open_nodes = set(), [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("Error"):  # what `once_differentiable` puts there
            try:
                node(torch.zeros(()))  # type: ignore[operator]
            except RuntimeError as error:
                raise _underivable(str(error)) from error
        open_nodes += [following for following, _ in node.next_functions]


def refuse_non_finite(name: str, gradient: Tensor) -> None:
    """Raise NonFiniteScoreError where `gradient` holds NaN or infinity."""
    bad = int((~torch.isfinite(gradient)).sum())
    if bad:
        raise NonFiniteScoreError(
            f"the gradient of {name} holds {bad} NaN or infinite values; use float32 or a smaller "
            f"loss, or leave the layer out with ignore=[{name!r}]"
        )


def non_finite_state(model: nn.Module) -> str | None:
    """The first parameter or buffer of `model` with NaN or infinite values, and how many it has."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() or tensor.is_complex():
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                return f"{name} of the model, which holds {bad} NaN or infinite values"
    return None


def _underivable(text: str) -> PaikernError:
    return PaikernError(
        f"the model cannot be differentiated as often as the method needs: {text.splitlines()[0]}; "
        "replace that operation (attention: attn_implementation='eager'), or use a method that "
        "needs one derivative, such as snip"
    )


def _shapes(batch: Batch) -> str:
    inputs = batch.inputs
    if not isinstance(inputs, Mapping):
        return f"{inputs.dtype} {list(inputs.shape)}"
    return ", ".join(
        f"{key} {list(value.shape)}" if isinstance(value, Tensor) else key
        for key, value in inputs.items()
    )


def _layer(model: nn.Module, trace: TracebackType | None) -> str:
    """The innermost module of the model that the error has come through."""
    names = {id(module): name for name, module in model.named_modules()}
    found = type(model).__name__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            found = f"{names[id(module)]} ({type(module).__name__})"
        trace = trace.tb_next
    return found
