"""Which backend runs an operation, and what `pk.backends()` says about each.

A backend is a module with functions named after the operations. The order of preference on a
device is the order of `_PREFERENCE`; `PAIKERN_BACKEND` or `backend=` forces one by name.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from paikern.backends import reference
from paikern.errors import BackendError

# None: ask the environment at every call. Within `using` the answer is settled, "" for automatic.
_forced: ContextVar[str | None] = ContextVar("paikern_backend", default=None)


def _load_cpu() -> tuple[ModuleType | None, str]:
    try:
        from paikern.backends import cpu
    except ImportError as error:
        return None, (
            f"the native module paikern._C could not be imported ({error}); "
            "run `pip install .` in the source folder, not only from within it"
        )
    return cpu, f"native kernels, {cpu.isa()}"


_cpu, _cpu_reason = _load_cpu()
_MODULES: dict[str, ModuleType | None] = {"cpu": _cpu, "reference": reference}
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("reference",)}


def backends() -> list[dict[str, Any]]:
    """One row a backend: name, devices, whether it is usable, and why or why not.

    Example:
        >>> import paikern as pk
        >>> [row["name"] for row in pk.backends() if row["usable"]][-1]
        'reference'
    """
    return [
        {"name": "cpu", "devices": "cpu", "usable": _cpu is not None, "reason": _cpu_reason},
        {
            "name": "reference",
            "devices": "cpu, cuda",
            "usable": True,
            "reason": "pure PyTorch, every dtype, slow",
        },
    ]


def names() -> tuple[str, ...]:
    return tuple(_MODULES)


@contextlib.contextmanager
def using(name: str | None) -> Iterator[None]:
    """Force a backend within a `with` block; None is PAIKERN_BACKEND or the automatic choice.

    Raises:
        BackendError: no such backend, or it is not usable here.
    """
    if name is None:
        name = _asked()
    else:
        _check(name, "backend")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def _check(name: str, source: str) -> None:
    if name not in _MODULES:
        raise BackendError(f"{source}: unknown backend {name!r}; available: {', '.join(_MODULES)}")
    if _MODULES[name] is None:
        reason = next(row["reason"] for row in backends() if row["name"] == name)
        raise BackendError(f"{source}: {name!r} is not usable here: {reason}")


def choose(operation: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs `operation` on these arguments, see `resolve`."""
    tensor = _first_tensor(args)
    device = tensor.device.type if tensor is not None else "cpu"
    return resolve(operation, device, wide(args))


def resolve(operation: str, device: str, float64: bool) -> Callable[..., Any]:
    """The function that runs `operation` on a device, for float64 tensors or narrower ones.

    A backend that has no float64 kernel for it passes to the next one. The answer is remembered:
    a network of small layers asks hundreds of times a step.
    """
    return _resolve(operation, device, float64, _asked())


def _asked() -> str:
    """The backend that the caller or the environment wants, "" for none."""
    forced = _forced.get()
    return os.environ.get("PAIKERN_BACKEND", "") if forced is None else forced


@functools.cache
def _resolve(operation: str, device: str, float64: bool, forced: str) -> Callable[..., Any]:
    if forced:
        _check(forced, "PAIKERN_BACKEND")
        order: tuple[str, ...] = (forced,)
    else:
        order = _PREFERENCE.get(device, ("reference",))
    for name in order:
        module = _MODULES[name]
        function = getattr(module, operation, None) if module is not None else None
        takes = getattr(module, "takes", None)
        if function is not None and (forced or takes is None or takes(operation, float64)):
            return function
    raise BackendError(
        f"{operation}: no backend of {order} runs it on {device}; use backend='reference'"
    )


def _first_tensor(args: tuple[Any, ...]) -> Tensor | None:
    for argument in args:
        if isinstance(argument, Tensor):
            return argument
        if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
            return argument[0]
    return None


def wide(args: tuple[Any, ...]) -> bool:
    """Whether a float64 tensor takes part: the native path kernels leave those to the reference."""
    return any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
