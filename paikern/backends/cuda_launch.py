"""Where the CUDA kernels come from, and how a backend starts them.

A step is one kernel with its grid and its arguments; a provider runs steps in order. There are two
on a machine with a GPU: `paikern._cuda`, built by nvcc, and `cuda_jit`, which compiles the same
text at run time. The tests bring a third that runs it on the CPU. Which kernels an operation
starts is said once, in `cuda_*.py`, and holds for all of them.

Parameters of kernels are pointers and integers of eight bytes, and doubles: Python's int and float.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "ALONE",
    "THREADS",
    "Provider",
    "Step",
    "current",
    "elementwise",
    "multiprocessors",
    "provided",
    "run",
    "together",
]

THREADS = 256
# Kernels whose blocks wait for each other: started only where all of them fit on the card.
COOPERATIVE = frozenset({"paikern_flow"})


class Step(NamedTuple):
    kernel: str
    blocks: int
    arguments: tuple[int | float, ...]
    threads: int = THREADS
    shared: int = 0  # bytes of dynamic shared memory


class Provider(Protocol):
    def run(self, steps: Sequence[Step], device: int, stream: int) -> None:
        """Start the kernels of `steps` one after the other."""

    def multiprocessors(self, device: int) -> int: ...

    def together(self, device: int, each: int) -> int:
        """Blocks that can wait for each other, where a multiprocessor holds `each`."""
        ...


class Native:
    """`paikern._cuda`, or a module built from the same sources."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def run(self, steps: Sequence[Step], device: int, stream: int) -> None:
        rows = [(s.kernel, s.blocks, s.threads, s.shared, s.arguments) for s in steps]
        self.module.run(rows, device, stream)

    def multiprocessors(self, device: int) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def together(self, device: int, each: int) -> int:
        return each * self.multiprocessors(device)


# Held from the launch of kernels whose blocks wait for each other until they are done: two grids
# that each have half of the card would wait for ever.
ALONE = threading.RLock()

_provider: ContextVar[Provider | None] = ContextVar("paikern_cuda_provider", default=None)


@contextlib.contextmanager
def provided(provider: Provider) -> Iterator[None]:
    """Within the block kernels come from `provider`."""
    token = _provider.set(provider)
    try:
        yield
    finally:
        _provider.reset(token)


def through(provider: Provider, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its kernels from `provider`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with provided(provider):
            return function(*args, **kwargs)

    call.__name__ = getattr(function, "__name__", "call")
    return call


def _current() -> Provider:
    provider = _provider.get()
    if provider is None:
        from paikern import _cuda

        provider = Native(_cuda)
    return provider


def run(like: Tensor, steps: Sequence[Step]) -> None:
    """Start kernels on the device of `like`, in torch's current stream there.

    Steps without blocks are left out: an empty grid is an error to CUDA.
    """
    started = [step for step in steps if step.blocks > 0]
    if not started:
        return
    if not like.is_cuda:
        _current().run(started, 0, 0)
        return
    with torch.cuda.device_of(like):
        device = like.get_device()
        _current().run(started, device, torch.cuda.current_stream(device).cuda_stream)


def multiprocessors(like: Tensor) -> int:
    return _current().multiprocessors(like.get_device())


def together(like: Tensor, each: int) -> int:
    """Blocks that are on the device at the same time, where a multiprocessor holds `each`."""
    return _current().together(like.get_device(), each)


def current() -> Provider:
    """Where kernels come from here and now, for objects that start some later."""
    return _current()


def elementwise(kernel: str, count: int, *arguments: int | float) -> Step:
    """One thread for each of `count` elements."""
    return Step(kernel, (count + THREADS - 1) // THREADS, arguments)
