"""Who is timed in the selection benchmark, and how.

A contender is called `loops` times for one sample, so that microseconds can be told apart, and has
a clock of its own, so that what it needs beforehand (a copy to reorder in place) is not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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
SPENT = 0.4  # seconds for the runs of a pair that is not slow
LEAST_RUNS, MOST_RUNS = 5, 15
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

    def start_over(self, loops: int = 1) -> None:
        """Drop the samples; from now on a sample is the mean of so many calls."""
        self.loops = loops
        self.samples.clear()


class Median(NamedTuple):
    """Seconds of a call, and of how many samples they are the median."""

    seconds: float
    samples: int


def versus(ours: Contender, rival: Contender, spent: float) -> tuple[Median, Median]:
    """Time two in turn (a b, b a, ...), after a round that warms up, and return their medians.

    A pair runs `SPENT` seconds but at least five times, one above `SLOW` three times; of one above
    `ONCE` the first run counts.
    """
    both = {"ours": ours, "rival": rival}
    for contender in both.values():
        contender.start_over()
    interleave(both, repeats=1, warmup=0)
    if rival.samples[0] >= ONCE:
        ours.start_over()
        interleave({"ours": ours}, repeats=3, warmup=0)
    else:
        if rival.samples[0] < SAMPLE:  # the first call of all is not typical
            interleave(both, repeats=2, warmup=0)
        expected = {name: min(contender.samples) for name, contender in both.items()}
        repeats = 3
        if expected["rival"] < SLOW:
            a_round = sum(max(seconds, SAMPLE) for seconds in expected.values())
            repeats = min(MOST_RUNS, max(LEAST_RUNS, round(spent / a_round)))
        for name, contender in both.items():
            contender.start_over(math.ceil(SAMPLE / max(expected[name], 1e-7)))
        interleave(both, repeats=repeats, warmup=0)
    first, second = (Median(statistics.median(c.samples), len(c.samples)) for c in both.values())
    return first, second


def measure(
    contenders: Mapping[str, Contender], *, spent: float = SPENT
) -> dict[str, tuple[Median, Median]]:
    """Time paikern against each of the others; name -> (paikern's median, the other's).

    One pair after the other: memory that a contender frees slows down the next one that allocates.
    np.partition of 10^8 took 0.24 s after itself and 0.4 to 1.1 s after torch.topk.
    """
    ours = contenders[OURS]
    return {name: versus(ours, rival, spent) for name, rival in contenders.items() if name != OURS}


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
