"""Every barrier of the kernels is needed: without it a result is wrong, or threads wait in vain.

The shim leaves one barrier out at a time and lets warps run ahead of each other in three ways, of
which a missing barrier is seen in at least one. Compared are the masks and what the kernels leave
in device memory: a wrong sample costs time, not a wrong mask.

Those that say "between blocks" order what one block writes before another reads: here blocks run
one after the other, so that only a GPU can miss them.

A kernel without its barrier may write anywhere, so that each runs in a process of its own, forked
by `python -m python_tests.cuda_source.test_barriers`, where nothing else has threads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from paikern.backends.cuda_launch import provided
from paikern.backends.cuda_layers import dense
from paikern.backends.cuda_select import SelectionPlan
from python_tests.cuda_source import shim

pytestmark = pytest.mark.cuda_source
BARRIERS = [
    (path.name, number)
    for path in sorted((shim.ROOT / "csrc/cuda").glob("select*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.match(r"\s*__syncthreads\(\);", line) and "between blocks" not in line
]


def selected(
    on_cpu: shim.OnCpu, scores: list[Tensor], k: list[int], exponents: list[int]
) -> list[Tensor]:
    """The masks, the states of the rankings, and the tiles' counts."""
    with provided(on_cpu):
        plan = SelectionPlan(dense(scores, (), False), k, exponents)
        plan._tiles.zero_()
        plan.launch()
    return [*plan.bits, plan._states.clone(), plan._tiles]


def cases() -> list[tuple[list[Tensor], list[int], list[int]]]:
    """Selections that between them pass every barrier."""
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(60_000, generator=generator)
    ties = torch.randint(0, 3, (150_000,), generator=generator).float()
    small = [torch.randn(n, generator=generator).round() for n in (3000, 9000, 100)]
    return [
        ([large], [5000], []),
        ([ties, ties[:9000]], [90_000], []),
        ([large, ties], [70_000], [2, 5]),
        (small, [1000, 5000, 31], []),
        ([torch.randn(30, generator=generator)] * 100, [1200], list(range(100, 0, -1))),
    ]


def seen(on_cpu: shim.OnCpu, file: str, line: int, wanted: list[list[Tensor]]) -> bool:
    """Whether something is wrong without this barrier."""
    for case, right in zip(cases(), wanted, strict=True):
        for way in (1, 2, 0):
            on_cpu.order(way)
            on_cpu.without_barrier(file, line)
            try:
                found = selected(on_cpu, *case)
            except RuntimeError as error:
                if "cuda_on_cpu: block" in str(error):
                    return True
                raise
            if not all(map(torch.equal, found, right)):
                return True
    return False


def main() -> None:
    """One line for each barrier: file, line, and 1 if it is missed."""
    on_cpu = shim.OnCpu(shim.build())
    wanted = [selected(on_cpu, *case) for case in cases()]
    for file, line in [("none", 1), *BARRIERS]:
        child = os.fork()
        if child == 0:
            os._exit(0 if seen(on_cpu, file, line, wanted) else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # A signal is a write to where nothing is: seen as well.
        print(file, line, int(status == 0 or status < 0), flush=True)


@pytest.fixture(scope="module")
def missed() -> dict[tuple[str, int], bool]:
    done = subprocess.run(
        [sys.executable, "-m", "python_tests.cuda_source.test_barriers"],
        cwd=shim.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(shim.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [row.split() for row in done.stdout.splitlines()]
    return {(file, int(line)): found == "1" for file, line, found in rows}


@pytest.fixture
def ordered(on_cpu: shim.OnCpu) -> Iterator[shim.OnCpu]:
    yield on_cpu
    on_cpu.order(0)


def test_results_do_not_depend_on_the_order_of_warps(ordered: shim.OnCpu) -> None:
    for case in cases():
        wanted = selected(ordered, *case)
        for way in (1, 2):
            ordered.order(way)
            assert all(map(torch.equal, selected(ordered, *case), wanted)), way
        ordered.order(0)


def test_with_all_barriers_nothing_is_wrong(missed: dict[tuple[str, int], bool]) -> None:
    assert missed["none", 1] is False
    assert len(BARRIERS) > 10


@pytest.mark.parametrize(("file", "line"), BARRIERS)
def test_a_missing_barrier_is_seen(
    missed: dict[tuple[str, int], bool], file: str, line: int
) -> None:
    assert missed[file, line]


if __name__ == "__main__":
    main()
