"""Who is timed in the selection benchmark, and how.

A contender is called `loops` times for one sample, so that microseconds can be told apart, and has
a clock of its own, so that what it needs beforehand (a copy to reorder in place) is not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.references import nth_element
from bench.timing import interleave
from paikern import ops

OURS = "paikern"
TOPK = "torch.topk"
TOPK_UNSORTED = "torch.topk(sorted=False)"
KTHVALUE = "torch.kthvalue"
SORT = "torch.sort"
PARTITION = "np.partition"
PARTITION_IN_PLACE = "ndarray.partition"
NTH_ELEMENT = "std::nth_element"
SUM = "torch.sum"
READ = "read"

RIVALS = (TOPK, TOPK_UNSORTED, KTHVALUE, SORT, PARTITION, PARTITION_IN_PLACE, NTH_ELEMENT)
FLOORS = (SUM, READ)
#: These have one thread, whatever they are given.
SINGLE = (PARTITION, PARTITION_IN_PLACE, NTH_ELEMENT)

SLOW = 0.5  # seconds: from here on three runs
ONCE = 4.0  # seconds: from here on the one run that was to warm up
SAMPLE = 2e-3  # seconds that one sample should last
SPENT = 1.0  # seconds for the runs of all that are not slow
MOST_RUNS = 31
CACHED = 16 << 20  # bytes: below, a read takes one thread


class Contender:
    """`action()`, or `action(prepare())` with the preparation outside the clock."""

    def __init__(
        self, action: Callable[..., object], prepare: Callable[[], Any] | None = None
    ) -> None:
        self.action = action
        self.prepare = prepare
        self.loops = 1
        self.samples: list[float] = []

    def __call__(self) -> None:
        total = 0.0
        for _ in range(self.loops):
            arguments = () if self.prepare is None else (self.prepare(),)
            start = time.perf_counter()
            self.action(*arguments)
            total += time.perf_counter() - start
        self.samples.append(total / self.loops)

    def forget(self) -> None:
        """Drop the samples of warming up, and settle on how many calls make one sample."""
        self.loops = max(1, math.ceil(SAMPLE / max(min(self.samples), 1e-7)))
        self.samples.clear()


Times = dict[str, tuple[float, int]]  # name -> (median seconds of a call, samples)


def measure(contenders: Mapping[str, Contender], *, spent: float = SPENT) -> Times:
    """Time the contenders in turn and return each one's median.

    After a round that warms up, all run three times; those below `SLOW` then go on, in turn among
    themselves, until they have used about `spent` seconds. Those above `ONCE` keep their first run.
    """
    interleave(contenders, repeats=1, warmup=0)
    if all(c.samples[-1] < 0.05 for c in contenders.values()):
        interleave(contenders, repeats=2, warmup=0)  # the first calls of all are not typical
    first = {name: min(c.samples) for name, c in contenders.items()}
    again = {name: c for name, c in contenders.items() if first[name] < ONCE}
    fast = {name: c for name, c in again.items() if first[name] < SLOW}
    for contender in again.values():
        contender.forget()
    if again:
        interleave(again, repeats=3, warmup=0)
    if fast:
        a_round = sum(max(first[name], SAMPLE) for name in fast)
        more = min(MOST_RUNS, max(5, round(spent / a_round))) - 3
        interleave(fast, repeats=more, warmup=0)
    return {name: (statistics.median(c.samples), len(c.samples)) for name, c in contenders.items()}


def contenders_for(scores: Tensor, k: int, names: Iterable[str]) -> dict[str, Contender]:
    """paikern, and the named contenders, set to find the k-th largest of a tensor `[N]`."""
    size = scores.numel()
    # Starting threads takes longer than one needs to read what lies in the caches.
    readers = torch.get_num_threads() if scores.nbytes >= CACHED else 1
    made = {
        OURS: Contender(lambda: ops.topk_mask(scores, k)),
        TOPK: Contender(lambda: torch.topk(scores, k)),
        TOPK_UNSORTED: Contender(lambda: torch.topk(scores, k, sorted=False)),
        KTHVALUE: Contender(lambda: torch.kthvalue(scores, size - k + 1)),
        SORT: Contender(lambda: torch.sort(scores, descending=True)),
        SUM: Contender(scores.sum),
        READ: Contender(lambda: nth_element.read_bytes(scores, readers)),
    }
    if scores.dtype != torch.bfloat16:  # NumPy has no such type
        array = scores.numpy()
        work = np.empty_like(array)

        def copy() -> np.ndarray:
            np.copyto(work, array)
            return work

        made |= {
            PARTITION: Contender(lambda: np.partition(array, size - k)),
            PARTITION_IN_PLACE: Contender(lambda held: held.partition(size - k), copy),
            NTH_ELEMENT: Contender(lambda held: nth_element.nth_element_(held, k), copy),
        }
    return {name: made[name] for name in (OURS, *names)}


def thresholds(scores: Tensor, k: int) -> dict[str, float]:
    """The k-th largest score by every contender that tells it: they have to agree."""
    size, array = scores.numel(), scores.numpy()
    mask = ops.unpack_mask(ops.topk_mask(scores, k)[0], scores.shape)
    return {
        OURS: float(scores[mask].min()),
        "kth_largest": ops.kth_largest(scores, k),
        TOPK: float(torch.topk(scores, k).values.min()),
        KTHVALUE: float(torch.kthvalue(scores, size - k + 1).values),
        SORT: float(torch.sort(scores, descending=True).values[k - 1]),
        PARTITION: float(np.partition(array, size - k)[size - k]),
        NTH_ELEMENT: nth_element.nth_element_(array.copy(), k),
    }
