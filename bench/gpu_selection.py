"""Exact selection on a GPU against what is there: torch.topk, torch.sort, CUB.

All of them find the k largest of n scores; paikern's result is a bit per score, theirs are values
or values and indices, k of them. The floor is one read of what is selected from and one write of
the bits, at the speed of a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu_clock import Clock, Contender, Times, normal, rotated, turn
from bench.gpu_cub import Cub
from bench.timing import Row
from paikern import ops
from paikern.backends import registry

SPARSITY = 0.9
COLUMNS = 10_000
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Scores and weights of one size take at most this share of the memory, contenders included.
_SHARE = 0.9
_SORT_BYTES = 32  # of torch.sort, a score: values and indices, in and out, and as much to sort by
_CHECKED = 100_000_000  # scores: above, masks are only counted


class Factored(NamedTuple):
    weight: Tensor
    a: Tensor
    g: Tensor


def room(device: torch.device) -> int:
    """Bytes that can be taken."""
    if device.type != "cuda":
        return 4 << 30
    return int(torch.cuda.mem_get_info(device)[0] * _SHARE)


def dense(
    clock: Clock, backends: list[str], n: int, kind: str, bandwidth: float, cub: Cub | None
) -> Iterator[Row]:
    """Scores that lie in memory; a row for each backend and rival."""
    dtype, k = TYPES[kind], n - int(SPARSITY * n)
    seeds = itertools.count()
    inputs = rotated(
        lambda: normal((n,), dtype, clock.device, next(seeds)).abs_(), n * dtype.itemsize
    )
    rivals: dict[str, Contender] = {
        "torch.topk": lambda i: torch.topk(turn(inputs, i), k, sorted=False)
    }
    if n * _SORT_BYTES < room(clock.device):
        rivals["torch.sort"] = lambda i: torch.sort(turn(inputs, i), descending=True)
    if cub is not None and dtype == torch.float32:
        cub_call = cub.topk(n, k, clock.device)
        rivals[cub.name] = lambda i: cub_call(turn(inputs, i))
    ours: dict[str, Contender] = {
        name: _forced(name, lambda i: ops.topk_mask([turn(inputs, i)], k)) for name in backends
    }
    if "cuda" in backends and clock.on_gpu:
        ours["cuda, in a graph"] = _plan(clock, inputs, k)
    agreed = _agree(ours, lambda: inputs[0], k, n)
    found = _measured(clock, {**ours, **rivals})
    nbytes = n * dtype.itemsize + (n + 7) // 8
    for name, rival in itertools.product(ours.keys() & found, rivals.keys() & found):
        yield _row(found, name, rival, n, kind, "dense", nbytes, bandwidth, agreed)


def factored(
    clock: Clock, backends: list[str], n: int, kind: str, bandwidth: float
) -> Iterator[Row]:
    """Scores |w| * a * g, made while they are read; PyTorch has to make them first."""
    dtype = TYPES[kind]
    shape = (max(1, n // COLUMNS), min(n, COLUMNS))
    n = shape[0] * shape[1]
    k = n - int(SPARSITY * n)
    seeds = itertools.count()

    def made() -> Factored:
        seed = next(seeds)
        return Factored(
            normal(shape, dtype, clock.device, seed),
            normal((shape[1],), torch.float32, clock.device, seed + 1).abs_(),
            normal((shape[0],), torch.float32, clock.device, seed + 2).abs_(),
        )

    inputs = rotated(made, n * dtype.itemsize)

    def select(i: int) -> Any:
        w, a, g = turn(inputs, i)
        return ops.topk_mask_factored([w], [a], [g], [0], k)

    def plain(i: int) -> Any:
        w, a, g = turn(inputs, i)
        return torch.topk((w.abs().float() * a * g[:, None]).view(-1), k, sorted=False)

    ours = {name: _forced(name, select) for name in backends}
    agreed = _agree(ours, lambda: inputs[0].weight, k, n)
    found = _measured(clock, {**ours, "torch.topk": plain})
    nbytes = n * dtype.itemsize + 4 * sum(shape) + (n + 7) // 8
    for name in ours.keys() & found if "torch.topk" in found else ():
        yield _row(found, name, "torch.topk", n, kind, "factored", nbytes, bandwidth, agreed)


def _forced(backend: str, select: Contender) -> Contender:
    def call(index: int) -> object:
        with registry.using(backend):
            return select(index)

    return call


def _plan(clock: Clock, inputs: list[Tensor], k: int) -> Contender:
    """What a loop of rounds runs: the launches alone, as one graph, NaN told only at the end."""
    from paikern.backends.cuda_layers import dense as layers_of
    from paikern.backends.cuda_select import SelectionPlan

    plans = [SelectionPlan(layers_of([scores], (), False), [k]) for scores in inputs]
    replays = [clock.captured(plan.launch)[0] for plan in plans]

    def call(index: int) -> object:
        turn(replays, index)()
        return turn(plans, index).bits

    return call


def _agree(ours: dict[str, Contender], first: Any, k: int, n: int) -> bool:
    """Whether all backends keep the same k; up to a size, in equal bits and counted."""
    masks = [call(0) for call in ours.values()]
    same = all(torch.equal(masks[0][0], other[0]) for other in masks[1:])
    if n <= _CHECKED:
        same &= int(ops.unpack_mask(masks[0][0], first().shape).sum()) == k
    return same


def _measured(clock: Clock, contenders: dict[str, Contender]) -> dict[str, Times]:
    """Those that fit; a rival that does not is left out with a word."""
    fit = {}
    for name, call in contenders.items():
        try:
            call(0)
            clock.wait()
        except RuntimeError as error:  # out of memory, or more than it can index
            print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            if clock.on_gpu:
                torch.cuda.empty_cache()
        else:
            fit[name] = call
    return clock.times(fit)


def _row(
    found: dict[str, Times], name: str, rival: str, n: int, kind: str, source: str, nbytes: int,
    bandwidth: float, agreed: bool,
) -> Row:  # fmt: skip
    ours, theirs = found[name], found[rival]
    return {
        "op": "topk",
        "kernel": source,
        "backend": name,
        "size": f"{n:,}",
        "dtype": kind,
        "sparsity": SPARSITY,
        "bytes": nbytes,
        "floor_seconds": nbytes / bandwidth,
        "seconds": ours.seconds,
        "spread": ours.spread,
        "reference": rival,
        "reference_seconds": theirs.seconds,
        "ratio": theirs.seconds / ours.seconds,
        "bandwidth_fraction": nbytes / ours.seconds / bandwidth,
        "masks_agree": agreed,
    }
