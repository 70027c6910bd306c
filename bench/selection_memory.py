"""Peak memory of a selection beyond its scores, each measured in a process of its own.

    python -m bench.selection_memory          all cases
    python -m bench.selection_memory normal-10000000-float32 ...

A case makes its scores in place, lets Linux forget the process's peak (`/proc/self/clear_refs`),
selects, and reads the peak again. The result, one bit a score, is part of what is counted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
THREADS = 2
KEEP = 0.1


class Case(NamedTuple):
    kind: str
    size: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.size}-{self.dtype}"


class Usage(NamedTuple):
    name: str
    score_bytes: int
    extra_bytes: int

    @property
    def ratio(self) -> float:
        """Extra memory in units of the scores' own."""
        return self.extra_bytes / self.score_bytes


KINDS = ("normal", "equal", "quantised", "transposed", "columns", "factored")
SHAPES = ((10_000_000, "float32"), (50_000_000, "float32"), (20_000_000, "float16"))
CASES = {
    case.name: case
    for case in (Case(kind, size, dtype) for size, dtype in SHAPES for kind in KINDS)
}


def measure(names: Sequence[str] = tuple(CASES)) -> list[Usage]:
    """Measure the named cases, in processes that run nothing else."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.selection_memory", "--json", *names],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"bench.selection_memory failed:\n{done.stderr}")
    return [Usage(**json.loads(line)) for line in done.stdout.splitlines()]


def prepared(case: Case) -> tuple[int, Callable[[], list[Tensor]]]:
    """The bytes of the scores (factored: of the weights), and the selection among them."""
    from paikern import ops

    dtype = getattr(torch, case.dtype)
    rows = max(d for d in range(1, math.isqrt(case.size) + 1) if case.size % d == 0)
    columns = case.size // rows
    k = int(KEEP * case.size)
    size = 2 * case.size if case.kind == "columns" else case.size
    scores = torch.empty(size, dtype=dtype)
    if case.kind == "equal":
        scores.fill_(0.5)
    elif case.kind == "quantised":
        scores.random_(0, 256)
    else:
        scores.normal_().abs_()
    if case.kind == "transposed":
        scores = scores.reshape(columns, rows).T
    elif case.kind == "columns":
        scores = scores.reshape(rows, 2 * columns)[:, ::2]
    if case.kind == "factored":
        weight, a, g = scores.reshape(rows, columns), torch.rand(columns), torch.rand(rows)
        return weight.nbytes, lambda: ops.topk_mask_factored([weight], [a], [g], [0], k)
    return scores.numel() * scores.element_size(), lambda: ops.topk_mask(scores, k)


def memory_now(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_beyond(action: Callable[[], object]) -> int:
    """How many bytes the process grew at most while `action` ran; its result is held."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_now("VmRSS")
    result = action()
    peak = memory_now("VmHWM")
    del result
    return peak - before


def _measure_here(case: Case) -> Usage:
    from paikern import ops

    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    ops.topk_mask(torch.rand(100), 10)  # what the first call loads is not the selection's
    score_bytes, select = prepared(case)
    return Usage(case.name, score_bytes, peak_beyond(select))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure cases one after another, each in a child that was forked before any thread ran."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    names = [name for name in given if name != "--json"] or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        print(f"unknown case {unknown[0]!r}; one of {', '.join(CASES)}", file=sys.stderr)
        return 2
    import paikern.ops  # noqa: F401  (once, here, instead of in every child)

    for name in names:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            usage = _measure_here(CASES[name])
            if as_json:
                print(json.dumps(usage._asdict()), flush=True)
            else:
                print(
                    f"{name:30} {usage.extra_bytes / 1e6:8.1f} MB  {usage.ratio:.3f}x", flush=True
                )
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:
            print(f"{name}: ended with status {status}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
