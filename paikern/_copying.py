"""Copies of models, also of those that keep what they have computed."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_Module = TypeVar("_Module", bound=nn.Module)


def copied(model: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """`copy.deepcopy(model, memo)`; tensors with a history are copied without it.

    PyTorch refuses to copy such tensors, but modules keep some as attributes: features for a later
    loss, the weight that `torch.nn.utils.prune` makes before each forward pass.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> layer.seen = layer(torch.ones(1, 2))
        >>> copied(layer).seen.requires_grad
        False
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in pytree.tree_leaves(dict(vars(module))):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)
