"""What this machine can do at most: bytes copied, bytes read and multiply-adds a second."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.references.nth_element import compiled, read_bytes

SOURCE = Path(__file__).with_suffix(".cpp")
PER_ROUND = 12 * 16  # multiply-adds of one thread, see peaks.cpp
ROUNDS = 20_000_000  # 25 ms at two registers a cycle and 4.8 GHz
FACTOR = 0.5  # x = x / 2 + 1: stays finite, and never small enough to slow down
BYTES = 512 << 20  # of each tensor: beyond the caches
RUNS = 7


class Peaks(NamedTuple):
    """Rates per second on `threads` threads; `copy` counts bytes read plus bytes written."""

    threads: int
    copy: float
    read: float
    multiply_adds: float


@functools.cache
def _library() -> ctypes.CDLL:
    loaded = compiled(SOURCE)
    loaded.multiply_adds.argtypes = [ctypes.c_int64, ctypes.c_int32, ctypes.c_float]
    loaded.multiply_adds.restype = ctypes.c_float
    return loaded


def multiply_adds(rounds: int, threads: int) -> float:
    """Do `threads * rounds * PER_ROUND` float32 multiply-adds; returns their sum."""
    if rounds < 0 or threads < 1:
        raise ValueError(f"multiply_adds: rounds >= 0 and threads >= 1, got {rounds}, {threads}")
    return float(_library().multiply_adds(rounds, threads, FACTOR))


def fastest(action: Callable[[], object], runs: int = RUNS) -> float:
    """The least seconds of several calls: a limit is what was reached once."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(threads: int, size: int = BYTES, rounds: int = ROUNDS) -> Peaks:
    """Measure all three with `threads` threads; two tensors of `size` bytes are made for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        source = torch.ones(size // 4)
        target = torch.zeros_like(source)
        copy = fastest(lambda: target.copy_(source))
        read = fastest(lambda: read_bytes(source, threads))
        multiply = fastest(lambda: multiply_adds(rounds, threads))
    finally:
        torch.set_num_threads(before)
    return Peaks(
        threads,
        2 * source.nbytes / copy,
        source.nbytes / read,
        threads * rounds * PER_ROUND / multiply,
    )
