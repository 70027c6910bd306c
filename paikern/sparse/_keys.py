"""State dicts of packed weights under the keys of the dense ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_dense_keys: ContextVar[bool] = ContextVar("paikern_dense_keys", default=False)


@contextlib.contextmanager
def dense_keys() -> Iterator[None]:
    """Within the block, `state_dict` of packed weights holds the dense weight under its own key.

    A packed weight that is the submodule `weight` of `fc` is then `fc.weight`, as it was before it
    was packed, not `fc.weight.values` and `fc.weight.mask`. Loading takes either without asking.

    Example:
        >>> import torch, paikern as pk
        >>> net = torch.nn.Module()
        >>> net.weight = pk.PackedWeight.from_dense(torch.ones(1, 2), torch.tensor([[True, False]]))
        >>> list(net.state_dict())
        ['weight.values', 'weight.mask']
        >>> with dense_keys():
        ...     list(net.state_dict().items())
        [('weight', tensor([[1., 0.]]))]
    """
    token = _dense_keys.set(True)
    try:
        yield
    finally:
        _dense_keys.reset(token)


def writes_dense_keys() -> bool:
    """Whether this is within `dense_keys`."""
    return _dense_keys.get()


def dense_key(prefix: str) -> str:
    """The key of the dense weight whose packed form has keys that begin with `prefix`."""
    return prefix[:-1] if prefix else "weight"
