"""Other tensors in the place of a model's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def holding(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, every module holds `tensors` where it held the parameters of these names.

    Unlike `torch.func.functional_call` this lasts over forward and backward passes alike, as blocks
    that are checkpointed compute their forward pass again during the latter. A parameter that
    several modules share is replaced in all of them.

    Args:
        model: the model to run.
        tensors: by the names of `model.named_parameters()`.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with holding(layer, {"weight": torch.tensor([[1.0, 2.0]])}):
        ...     layer(torch.ones(1, 2)).item()
        3.0
        >>> isinstance(layer.weight, nn.Parameter)
        True
    """
    held = dict(model.named_parameters())
    others = {id(held[name]): tensor for name, tensor in tensors.items()}
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in others
    ]
    try:
        for module, key, parameter in places:
            module._parameters[key] = others[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter
