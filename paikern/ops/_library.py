"""The torch library `paikern::*`: one schema an operation, kernels looked up by backend.

`torch.library.define` with `register_kernel` per device costs about 3 us a call where the
`custom_op` decorator costs 8-17 us, which a network of small layers would feel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paikern.backends import registry

NAMESPACE = "paikern"
_library = torch.library.Library(NAMESPACE, "DEF")

# Where tensors may live. CUDA tensors reach the same lookup and find the backends usable there.
_DEVICES = ("CPU", "CUDA")


def define(schema: str) -> None:
    """Declare an operation and route its CPU and CUDA kernels to `backends.registry`.

    Args:
        schema: as for `torch.library.define`, without the namespace: "pack_mask(Tensor mask) ->
            Tensor". The name before the bracket is the name of the function in every backend.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        return registry.choose(name, args)(*args, **kwargs)

    for key in _DEVICES:
        _library.impl(name, kernel, key)


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the shape function of an operation, for meta tensors and `torch.compile`."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register the derivative of an operation."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
    )
