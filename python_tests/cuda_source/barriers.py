"""Every barrier of the kernels is needed: without it a result is wrong, or threads wait in vain.

The shim leaves one barrier out at a time and lets warps run ahead of each other in three ways, of
which a missing barrier is seen in at least one. Those that say "between blocks" order what one
block writes before another reads: here blocks run one after the other, so that only a GPU can miss
them.

A kernel without its barrier may write anywhere and need not end, so that each runs in a process of
its own, forked by a module's `main`, where nothing else has threads.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from python_tests.cuda_source import shim

Barrier = tuple[str, int]
Results = Callable[[shim.OnCpu], Iterator[list[Tensor]]]
_LONGEST = 20  # a child that takes so many times as long as all results waits in vain


def of(*patterns: str) -> list[Barrier]:
    """File and line of the barriers in the files that match."""
    folder = shim.ROOT / "csrc/cuda"
    return [
        (path.name, number)
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.match(r"\s*__syncthreads\(\);", line) and "between blocks" not in line
    ]


def _seen(on_cpu: shim.OnCpu, barrier: Barrier, results: Results, wanted: Sequence[object]) -> bool:
    """Whether something is wrong without this barrier."""
    for way in (1, 2, 0):
        on_cpu.order(way)
        on_cpu.without_barrier(*barrier)
        try:
            for found, right in zip(results(on_cpu), wanted, strict=True):
                if not all(map(torch.equal, found, right)):
                    return True
        except RuntimeError as error:
            if "cuda_on_cpu: block" in str(error):
                return True
            raise
    return False


def main(listed: Sequence[Barrier], results: Results) -> None:
    """One line for each barrier: file, line, and 1 if it is missed."""
    on_cpu = shim.OnCpu(shim.build())
    began = time.perf_counter()
    wanted = list(results(on_cpu))
    limit = 1 + _LONGEST * (time.perf_counter() - began)
    for barrier in [("none", 1), *listed]:
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, limit)
            os._exit(0 if _seen(on_cpu, barrier, results, wanted) else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # A signal is a write to where nothing is, or an end that does not come: seen as well.
        print(*barrier, int(status == 0 or status < 0), flush=True)


def missed(module: str) -> dict[Barrier, bool]:
    """What `main` of a module tells."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=shim.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(shim.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [row.split() for row in done.stdout.splitlines()]
    return {(file, int(line)): found == "1" for file, line, found in rows}
