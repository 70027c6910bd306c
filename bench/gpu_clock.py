"""Timing on a GPU: events in the stream, contenders in turn, inputs that no cache still holds.

Before each call the device is kept busy for a moment, so that a call that only queues kernels is
timed by what they take and not by how fast Python is; one that waits for the device is timed whole.
On a CPU, for trials of the benchmark itself, a clock does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Bytes that a set of inputs takes at least: four times the 60 MB of the largest cache.
ROTATED = 240 << 20
MOST_COPIES = 8
_BUSY = 1_000_000  # cycles, half a millisecond

Contender = Callable[[int], object]
"""Called with the number of the call, by which it takes its turn of the inputs."""


class Times(NamedTuple):
    """Medians of a contender, and how far its samples lie apart."""

    seconds: float
    spread: float  # between the quartiles, over the median
    samples: int


class Clock:
    """Times contenders on `device`, each measurement in about `seconds`."""

    def __init__(self, device: str, seconds: float = 1.0, most: int = 30) -> None:
        self.device = torch.device(device)
        self.seconds, self.most = seconds, most

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def times(self, contenders: Mapping[str, Contender]) -> dict[str, Times]:
        """The contenders in turn, the order turning round, after a round that warms up."""
        for call in contenders.values():
            call(0)
        self.wait()
        began = time.perf_counter()
        samples = {name: [self._once(call, 1)] for name, call in contenders.items()}
        a_round = time.perf_counter() - began
        repeats = max(3, min(self.most, int(self.seconds / max(a_round, 1e-6))))
        names = list(contenders)
        for index in range(2, repeats + 2):
            for name in names if index % 2 else reversed(names):
                samples[name].append(self._once(contenders[name], index))
        return {name: _summary(found[1:]) for name, found in samples.items()}

    def _once(self, call: Contender, index: int) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            call(index)
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_BUSY)
        start.record()
        call(index)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def whole(self, call: Callable[[], object], repeats: int = 1) -> float:
        """Seconds of a call that comes back when it is done, by the wall; the median."""
        found = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def captured(self, call: Callable[[], object]) -> tuple[Callable[[], object], bool]:
        """The call as one CUDA graph, and whether it could be made one."""
        if not self.on_gpu:
            return call, False
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # it waits for the device: timed as it is
            torch.cuda.synchronize(self.device)
            return call, False
        return graph.replay, True


def _summary(samples: list[float]) -> Times:
    median = statistics.median(samples)
    quarters = statistics.quantiles(samples, n=4) if len(samples) > 1 else [median] * 3
    return Times(median, (quarters[2] - quarters[0]) / median if median else 0.0, len(samples))


def rotated(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """As many inputs as leave none of them in a cache when its turn comes again."""
    return [make() for _ in range(max(1, min(MOST_COPIES, -(-ROTATED // max(nbytes, 1)))))]


def turn(inputs: Sequence[Any], index: int) -> Any:
    return inputs[index % len(inputs)]


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Values of N(0, 1), made on the device in pieces, so that a large one needs no second copy."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.empty(tuple(shape), dtype=dtype, device=device)
    flat = values.view(-1)
    piece = 1 << 26
    for first in range(0, flat.numel(), piece):
        part = flat[first : first + piece]
        part.copy_(torch.randn(part.numel(), device=device, generator=generator))
    return values


def copy_bandwidth(clock: Clock, nbytes: int) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = normal((nbytes // 4,), torch.float32, clock.device, 0)
    target = torch.empty_like(source)
    found = clock.times({"copy": lambda _: target.copy_(source)})
    return 2 * source.numel() * 4 / found["copy"].seconds
