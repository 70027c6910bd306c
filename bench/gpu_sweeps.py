"""Sweeps on a GPU: how near to the speed of a copy they read weights.

Of one layer from 64 MB to 1 GB, and of stacks of layers: as many and as large as ResNet-50's, and
the linear layers of a model of seven billion weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu_clock import Clock, Contender, Times, normal, rotated, turn
from bench.timing import Row
from paikern import ops
from paikern.backends import registry

COLUMNS = 8192
THRESHOLD = 1.0
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Sizes(NamedTuple):
    """What is measured: megabytes of a layer; a factor that makes stacks smaller for trials."""

    megabytes: tuple[int, ...] = (64, 256, 1024)
    columns: int = COLUMNS
    shrink: int = 1


class Inputs(NamedTuple):
    weight: Tensor
    x: Tensor
    g: Tensor


def _inputs(shape: tuple[int, int], dtype: torch.dtype, clock: Clock, seed: int) -> Inputs:
    def vector(n: int) -> Tensor:
        return normal((n,), torch.float32, clock.device, seed + 1).abs_()

    return Inputs(normal(shape, dtype, clock.device, seed), vector(shape[1]), vector(shape[0]))


def _calls(i: Inputs) -> dict[str, Callable[[], object]]:
    return {
        "path_forward": lambda: ops.path_forward(i.weight, i.x),
        "path_backward": lambda: ops.path_backward(i.weight, i.g),
        "path_sweep": lambda: ops.path_sweep(i.weight, i.x, i.g, THRESHOLD),
    }


def _plain(i: Inputs) -> dict[str, Callable[[], object]]:
    """The same in PyTorch, the score of a sweep and its comparison in tensors of their own."""
    x, g = i.x.to(i.weight.dtype), i.g.to(i.weight.dtype)
    return {
        "path_forward": lambda: i.weight.abs() @ x,
        "path_backward": lambda: i.weight.abs().T @ g,
        "path_sweep": lambda: (
            i.weight.abs().T @ g,
            i.weight.abs() * x * g[:, None] > THRESHOLD,
        ),
    }


def moved(kernel: str, shape: tuple[int, int], size: int) -> int:
    """The fewest bytes: the weight once, the vectors, the bits of a sweep."""
    rows, columns = shape
    vectors = {"path_sweep": rows + 2 * columns}.get(kernel, rows + columns)
    bits = (rows * columns + 7) // 8 if kernel == "path_sweep" else 0
    return rows * columns * size + 4 * vectors + bits


def layers(clock: Clock, backends: list[str], sizes: Sizes, bandwidth: float) -> Iterator[Row]:
    """A row for each size, type, kernel and backend, against PyTorch."""
    for megabytes in sizes.megabytes:
        for dtype in TYPES:
            yield from layer(clock, backends, megabytes, dtype, sizes.columns, bandwidth)


def layer(
    clock: Clock, backends: list[str], megabytes: int, kind: str, columns: int, bandwidth: float
) -> Iterator[Row]:
    dtype = TYPES[kind]
    shape = (max(1, (megabytes << 20) // dtype.itemsize // columns), columns)
    seeds = itertools.count()
    inputs = rotated(lambda: _inputs(shape, dtype, clock, next(seeds)), megabytes << 20)
    ours, plain = [_calls(i) for i in inputs], [_plain(i) for i in inputs]
    for kernel in ours[0]:
        contenders: dict[str, Contender] = {
            "torch": lambda n, kernel=kernel: turn(plain, n)[kernel](),
            **{b: _forced(b, ours, kernel) for b in backends},
        }
        found = clock.times(contenders)
        nbytes = moved(kernel, shape, dtype.itemsize)
        for backend in backends:
            yield {
                "op": "path",
                "kernel": kernel,
                "backend": backend,
                "size": f"{megabytes} MB",
                "shape": list(shape),
                "dtype": kind,
                "sparsity": 0.0,
                **_columns(found, backend, nbytes, bandwidth),
            }


def _forced(backend: str, calls: list[dict[str, Callable[[], object]]], kernel: str) -> Contender:
    def call(index: int) -> object:
        with registry.using(backend):
            return turn(calls, index)[kernel]()

    return call


def _columns(found: dict[str, Times], backend: str, nbytes: int, bandwidth: float) -> Row:
    """What every row of a sweep says of its times; the floor is the speed of a copy."""
    seconds, reference = found[backend].seconds, found["torch"].seconds
    return {
        "bytes": nbytes,
        "floor_seconds": nbytes / bandwidth,
        "seconds": seconds,
        "spread": found[backend].spread,
        "reference": "torch",
        "reference_seconds": reference,
        "ratio": reference / seconds,
        "bandwidth_fraction": nbytes / seconds / bandwidth,
    }


def resnet50(shrink: int = 1) -> list[tuple[int, int]]:
    """The weights of ResNet-50 as matrices [out, in * kernel]."""
    from paikern import zoo
    from paikern.prunable import prunable_parameters

    with torch.device("meta"):
        model = zoo.create("resnet50", num_classes=1000)
    shapes = [p.shape for p in prunable_parameters(model).values()]
    return [(max(1, s[0] // shrink), max(1, math.prod(s[1:]) // shrink)) for s in shapes]


def seven_billion(shrink: int = 1) -> list[tuple[int, int]]:
    """The linear layers of a language model of 7B weights: 32 blocks of width 4096."""
    wide, inner = 4096 // shrink, 11008 // shrink
    block = [(wide, wide)] * 4 + [(inner, wide)] * 2 + [(wide, inner)]
    return block * max(1, 32 // shrink)


STACKS = {"resnet50": (resnet50, "float32"), "7B": (seven_billion, "bfloat16")}


def stack(
    clock: Clock, backends: list[str], name: str, sizes: Sizes, bandwidth: float
) -> Iterator[Row]:
    """Two reads of every layer, forward and the fused backward half, as a round has them.

    The floor is the time of those bytes at the speed of a copy; launches go into one CUDA graph
    where they can.
    """
    shapes_of, kind = STACKS[name]
    shapes, dtype = shapes_of(sizes.shrink), TYPES[kind]
    inputs = [_inputs(shape, dtype, clock, seed) for seed, shape in enumerate(shapes)]
    calls = [_calls(i) for i in inputs]
    plain = [_plain(i) for i in inputs]
    nbytes = sum(
        moved(kernel, shape, dtype.itemsize)
        for shape in shapes
        for kernel in ("path_forward", "path_sweep")
    )

    def a_round(of: list[dict[str, Callable[[], object]]]) -> None:
        for layer in of:
            layer["path_forward"]()
        for layer in reversed(of):
            layer["path_sweep"]()

    replays, in_graph = {}, {}
    for backend in backends:

        def ours(b: str = backend) -> None:
            with registry.using(b):
                a_round(calls)

        replays[backend], in_graph[backend] = clock.captured(ours)
    replays["torch"], in_graph["torch"] = clock.captured(lambda: a_round(plain))
    found = clock.times({key: lambda _, c=call: c() for key, call in replays.items()})
    for backend in backends:
        yield {
            "op": "path",
            "kernel": "round",
            "backend": backend,
            "size": f"{name}, {sum(math.prod(s) for s in shapes):,} weights",
            "layers": len(shapes),
            "dtype": kind,
            "sparsity": 0.0,
            "graph": in_graph[backend],
            **_columns(found, backend, nbytes, bandwidth),
        }
