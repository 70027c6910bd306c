"""Which backend runs an operation, and what `pk.backends()` says about each.

A backend is a module with functions named after the operations. Each serves some kinds of device;
which one is asked first is said in `choice.RULES`. `PAIKERN_BACKEND` or `backend=` forces one by
name.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paikern.backends import choice
from paikern.errors import BackendError

_forced: ContextVar[str | None] = ContextVar("paikern_backend", default=None)
_ISAS = ("portable", "avx2", "avx512")


class Backend(NamedTuple):
    """A backend, usable if it has a module; `reason` says why or why not.

    It serves `devices` by itself, and those of `asked_for` where the caller forces it by name.
    """

    module: ModuleType | SimpleNamespace | None
    devices: tuple[str, ...]
    reason: str
    asked_for: tuple[str, ...] = ()


def _load_cpu() -> Backend:
    asked = os.environ.get("PAIKERN_CPU_ISA")
    if asked and asked not in _ISAS:
        raise BackendError(f"PAIKERN_CPU_ISA must be one of {', '.join(_ISAS)}, got {asked!r}")
    try:
        from paikern.backends import cpu
    except ImportError as error:
        return Backend(
            None,
            ("cpu",),
            f"the native module paikern._C could not be imported ({error}); "
            "run `pip install .` in the source folder, not only from within it",
        )
    return Backend(cpu, ("cpu",), f"native kernels, {cpu.isa()}")


def _load_cuda() -> Backend:
    try:
        from paikern import _cuda
    except ImportError as error:
        return Backend(
            None,
            ("cuda",),
            f"the module paikern._cuda could not be imported ({error}); it is built where nvcc is "
            "found, see PAIKERN_CUDA",
        )
    count, why = _cuda.device_count()
    if count == 0:
        return Backend(None, ("cuda",), f"no GPU: {why or 'CUDA finds no device'}")
    if not torch.cuda.is_available():
        return Backend(None, ("cuda",), "PyTorch cannot use the GPU here; install its CUDA build")
    from paikern.backends import cuda

    return Backend(cuda, ("cuda",), f"native kernels, {count} GPU")


def _load_triton() -> Backend:
    try:
        from paikern.backends import triton
    except ImportError as error:
        return Backend(
            None,
            ("cuda",),
            f"triton could not be imported ({error}); `pip install 'paikern[triton]'`",
        )
    if triton.interpreting():
        reason = "Triton's interpreter (TRITON_INTERPRET), slow, where asked for by name"
        return Backend(triton, (), reason, ("cpu", "cuda"))
    if not torch.cuda.is_available():
        return Backend(
            None,
            ("cuda",),
            "no GPU that this build of PyTorch can use; TRITON_INTERPRET=1 runs the kernels on "
            "the CPU, slowly",
        )
    return Backend(triton, ("cuda",), f"Triton kernels, {torch.cuda.device_count()} GPU")


def _load_cuda_jit() -> Backend:
    from paikern.backends import cuda_jit

    launcher, compiler, why = cuda_jit.why_not()
    if why:
        return Backend(None, ("cuda",), why)
    module = cuda_jit.backend(cuda_jit.Jit(launcher, compiler))
    return Backend(module, ("cuda",), "native kernels, compiled by NVRTC when first used")


def _load_reference() -> Backend:
    from paikern.backends import reference

    return Backend(reference, ("cpu", "cuda"), "pure PyTorch, every dtype, slow")


_LOADERS = {
    "cpu": _load_cpu,
    "cuda": _load_cuda,
    "triton": _load_triton,
    "cuda_jit": _load_cuda_jit,
    "reference": _load_reference,
}


@functools.cache
def load(name: str) -> Backend:
    """A backend by name, imported when first asked for: CUDA is not touched before it is needed."""
    return _LOADERS[name]()


def backends() -> list[dict[str, Any]]:
    """One row a backend: name, devices, whether it is usable, and why or why not.

    Example:
        >>> import paikern as pk
        >>> [row["name"] for row in pk.backends() if row["usable"]][-1]
        'reference'
    """
    return [
        {
            "name": name,
            "devices": ", ".join(load(name).devices or load(name).asked_for),
            "usable": load(name).module is not None,
            "reason": load(name).reason,
        }
        for name in _LOADERS
    ]


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
    if name not in _LOADERS:
        raise BackendError(f"{source}: unknown backend {name!r}; available: {', '.join(_LOADERS)}")
    if load(name).module is None:
        raise BackendError(f"{source}: {name!r} is not usable here: {load(name).reason}")


def choose(operation: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs `operation` on these arguments, see `resolve`.

    Raises:
        ValueError: tensors on different devices, whose addresses no kernel may mix.
    """
    device, on_cpu, float64, numel = None, False, False, 0
    for tensor in _tensors(args):
        float64 |= tensor.dtype is torch.float64
        if device is None:
            device, on_cpu, numel = tensor.device, tensor.is_cpu, tensor.numel()
        # `is_cpu` first: comparing devices is ten times as slow.
        elif not (on_cpu and tensor.is_cpu) and tensor.device != device:
            raise ValueError(
                f"{operation}: tensors are on {device} and {tensor.device}; move them to one device"
            )
    return resolve(operation, device.type if device is not None else "cpu", float64, numel)


def resolve(operation: str, device: str, float64: bool, numel: int = 0) -> Callable[..., Any]:
    """The function that runs `operation` on a device, for float64 tensors or narrower ones.

    The order in which backends are asked is that of `choice.RULES` for a tensor of `numel`
    elements. A backend that has no float64 kernel for it passes to the next one. The answer is
    remembered: a network of small layers asks hundreds of times a step.
    """
    size = choice.size_class(operation, device, numel)
    return _resolve(operation, device, float64, _asked(), size)


def has(operation: str, device: str) -> bool:
    """Whether a usable backend has something of this name for a device."""
    try:
        resolve(operation, device, False)
    except BackendError:
        return False
    return True


def _asked() -> str:
    """The backend that the caller or the environment wants, "" for none."""
    forced = _forced.get()
    return os.environ.get("PAIKERN_BACKEND", "") if forced is None else forced


@functools.cache
def _resolve(
    operation: str, device: str, float64: bool, forced: str, size: int
) -> Callable[..., Any]:
    if forced:
        _check(forced, "PAIKERN_BACKEND")
    for name in (forced,) if forced else choice.order(operation, device, size):
        backend = load(name)
        served = device in backend.devices or (bool(forced) and device in backend.asked_for)
        # Only the reference goes by torch's own operations and so runs wherever they do.
        if not served and name != "reference":
            continue
        module = backend.module
        function = getattr(module, operation, None)
        takes = getattr(module, "takes", None)
        if function is not None and (takes is None or takes(operation, float64)):
            return function
    raise BackendError(
        f"{operation}: backend {forced!r} has no kernel for {'float64' if float64 else 'these'} "
        f"tensors on {device}; use backend='reference'"
    )


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in args:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from (item for item in argument if isinstance(item, Tensor))
