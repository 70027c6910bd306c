"""How many rows of x each layer gets, by running the model once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paikern._names import unwrap

# Rows of x where nothing else is known: a batch of 32 samples through a linear layer.
DEFAULT_BATCH = 32


def check_batch(operation: str, batch: Any) -> None:
    if batch is not None and (type(batch) is not int or batch < 1):
        raise ValueError(f"{operation}: batch must be an int of at least 1, got {batch!r}")


def check_flags(operation: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{operation}: {name} must be True or False, got {value!r}")


def input_shapes(
    operation: str, model: nn.Module, layers: Sequence[nn.Module], example_inputs: Any
) -> dict[int, tuple[int, ...]]:
    """The largest x that each of `layers` gets, by `id(layer)`; those never called are missing.

    The model runs once, in eval mode and without gradients, so that no statistics move.

    Args:
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments.

    Raises:
        TypeError: example_inputs of another type. ValueError: the model does not run on them.
    """
    args, kwargs = _arguments(operation, example_inputs)
    found: dict[int, tuple[int, ...]] = {}

    def look(layer: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0] if given else None
        if isinstance(x, Tensor):
            shape = tuple(x.shape)
            known = found.get(id(layer))
            if known is None or x.numel() > torch.Size(known).numel():
                found[id(layer)] = shape

    inner = unwrap(model)
    modes = {module: module.training for module in inner.modules()}
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        inner.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            inner(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{operation}: the model does not run on example_inputs: {said}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def _arguments(operation: str, example_inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return example_inputs, {}
    raise TypeError(
        f"{operation}: example_inputs must be a tensor, a tuple of positional or a dict of keyword "
        f"arguments, got {type(example_inputs).__name__}"
    )
