"""SynFlow in a process of its own: its peak memory beyond the model, and the time of a round.

    python -m bench.paths_process                                  paikern on three networks
    python -m bench.paths_process paikern:vgg16_bn torch:stack-64  the cases that are named

`bench/paths_scaling.py` names the cases of the benchmark. A case is `who:model`; `stack-64` is four
square linear layers of 64 * 2**20 weights in all. The case makes its model, lets Linux forget the
process's peak (`/proc/self/clear_refs`), prunes, and reads the peak again: masks and everything in
between are counted, the model is not.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.selection_memory import peak_beyond

ROOT = Path(__file__).parents[1]
OURS, LOOP = "paikern", "torch"
SPARSITY = 0.9
SEED = 0
DEPTH = 4
MILLION = 1 << 20
#: Rounds of one run. The first plans and finds its threshold without a predecessor: not counted.
ROUNDS = {OURS: 6, LOOP: 3}
SPENT, MOST_RUNS = 1.0, 15  # short runs are repeated for so many seconds
MODELS = {
    "resnet20": {"num_classes": 10},
    "vgg16_bn": {"num_classes": 100},
    "resnet50": {"num_classes": 1000},
}
#: Models whose path totals overflow float32: the loop needs float64, or it keeps nothing.
WIDE = ("resnet50",)


class Case(NamedTuple):
    who: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.who}:{self.model}"

    @classmethod
    def parse(cls, text: str) -> Case:
        """Of `who:model`; ValueError says what there is."""
        who, _, model = text.partition(":")
        if who not in ROUNDS or not (model in MODELS or _millions(model)):
            raise ValueError(
                f"unknown case {text!r}; {' or '.join(ROUNDS)}, a colon, and one of "
                f"{', '.join(MODELS)} or stack-N (N * 2**20 weights)"
            )
        return cls(who, model)


class Usage(NamedTuple):
    """What a case took; `round_seconds` is the median of all rounds but the first of each run."""

    name: str
    weights: int
    weight_bytes: int
    extra_bytes: int
    round_seconds: float
    rounds: int
    kept: int
    dtype: str

    @property
    def ratio(self) -> float:
        """Extra memory in units of the model's weights, which are float32."""
        return self.extra_bytes / self.weight_bytes


def _millions(model: str) -> float:
    name, _, count = model.partition("-")
    try:
        return float(count) if name == "stack" else 0.0
    except ValueError:
        return 0.0


def side_of(model: str) -> int:
    """Width of each of the square layers of a stack.

    >>> side_of("stack-64"), side_of("stack-8")
    (4096, 1448)
    """
    return round(math.sqrt(_millions(model) * MILLION / DEPTH))


def stack(side: int, depth: int = DEPTH) -> nn.Sequential:
    """Square linear layers of normal weights without biases."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(depth)))
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        parameter.data.normal_(0, side**-0.5, generator=generator)
    return model


def prepared(model: str) -> tuple[nn.Module, Tensor]:
    """The model and one input of it."""
    from paikern import zoo

    if model in MODELS:
        net = zoo.create(model, seed=SEED, **MODELS[model]).eval()
        return net, zoo.example_input(net)
    side = side_of(model)
    return stack(side), torch.ones(1, side)


def runner(
    who: str, model: str, net: nn.Module, example: Tensor
) -> Callable[[Callable[[], None]], int]:
    """`run(tick)` prunes, calls `tick` after every round and returns how many weights it keeps."""
    import paikern as pk
    from bench.references.synflow import synflow
    from paikern.scorers import path_loop

    # Several rounds are made in one native call and told together: here each is to be timed.
    path_loop._SECONDS_A_CALL = 0.0

    def ours(tick: Callable[[], None]) -> int:
        masks = pk.prune(
            net, "synflow", sparsity=SPARSITY, example_inputs=example, rounds=ROUNDS[OURS],
            apply=False, progress=lambda *_: tick(),
        )  # fmt: skip
        return masks.kept

    def loop(tick: Callable[[], None]) -> int:
        dtype = torch.float64 if model in WIDE else torch.float32
        masks = synflow(net, example, SPARSITY, ROUNDS[LOOP], dtype=dtype, report=lambda _: tick())
        return sum(int(torch.count_nonzero(mask)) for mask in masks.values())

    return ours if who == OURS else loop


def _measure_here(case: Case, threads: int) -> Usage:
    torch.set_num_threads(threads)
    for other in ("stack-1", *(["resnet20"] if case.model in MODELS else [])):
        runner(case.who, other, *prepared(other))(lambda: None)  # what the first call loads
    net, example = prepared(case.model)
    run = runner(case.who, case.model, net, example)
    seconds: list[float] = []
    kept = 0

    def once() -> None:
        nonlocal kept
        stamps: list[float] = []
        kept = run(lambda: stamps.append(time.perf_counter()))
        seconds.extend(b - a for a, b in itertools.pairwise(stamps))

    ctypes.CDLL(None).malloc_trim(0)  # or memory that is free but not given back would be reused
    start = time.perf_counter()
    extra = peak_beyond(once)
    for _ in range(MOST_RUNS - 1):
        if time.perf_counter() - start > SPENT:
            break
        once()
    weights = [p for p in net.parameters() if p.dim() > 1]
    return Usage(
        case.name,
        sum(w.numel() for w in weights),
        sum(w.nbytes for w in weights),
        extra,
        statistics.median(seconds),
        len(seconds),
        kept,
        "float64" if case.who == LOOP and case.model in WIDE else "float32",
    )


class Measurer:
    """Measures cases one after another, each in a process that runs nothing else.

    A context manager: the process that the others are forked from is started once.
    """

    def __init__(self, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "bench.paths_process", "--serve"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._parent.communicate()

    def __call__(self, name: str) -> Usage:
        """The case `who:model`; RuntimeError if its process failed."""
        asked, answered = self._parent.stdin, self._parent.stdout
        assert asked is not None
        assert answered is not None
        asked.write(f"{name}\n")
        asked.flush()
        line = answered.readline()
        if not line:
            raise RuntimeError(f"bench.paths_process: {name} failed")
        return Usage(**json.loads(line))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the named cases, or those that come line by line, and print one JSON a line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    serve = given == ["--serve"]
    try:
        cases = [Case.parse(name) for name in given if not serve]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    _load()
    usual = [Case(OURS, model) for model in MODELS]
    for case in map(Case.parse, map(str.strip, sys.stdin)) if serve else cases or usual:
        sys.stdout.flush()
        child = os.fork()  # before any thread ran
        if child == 0:
            print(json.dumps(_measure_here(case, threads)._asdict()), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            print(f"{case.name}: ended with status {status}", file=sys.stderr)
            return 1
    return 0


def _load() -> None:
    """Once, here, instead of in every child: paikern, and what tracing imports."""
    from paikern.pathgraph import trace

    trace(stack(2), torch.ones(1, 2))


if __name__ == "__main__":
    raise SystemExit(main())
