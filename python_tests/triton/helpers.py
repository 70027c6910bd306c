"""Running one call on several backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from paikern.backends import registry

T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 31, 33, 1000)


def on(backend: str, call: Callable[[], T]) -> T:
    with registry.using(backend):
        return call()


def both(call: Callable[[], T], other: str = "cpu") -> tuple[T, T]:
    """What Triton and another backend find."""
    return on("triton", call), on(other, call)
