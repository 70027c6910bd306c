"""Every barrier of the kernels is needed: without it a result is wrong, or threads wait in vain.

The shim leaves one barrier out at a time and lets warps run ahead of each other in three ways, of
which a missing barrier is seen in at least one. Compared are the masks and what the kernels leave
in device memory: a wrong sample costs time, not a wrong mask.

Those that say "between blocks" order what one block writes before another reads: here blocks run
one after the other, so that only a GPU can miss them.
"""

from __future__ import annotations

import re
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


@pytest.fixture
def switches(on_cpu: shim.OnCpu) -> Iterator[shim.OnCpu]:
    yield on_cpu
    on_cpu.without_barrier("", 0)
    on_cpu.order(0)


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


def test_results_do_not_depend_on_the_order_of_warps(switches: shim.OnCpu) -> None:
    for case in cases():
        wanted = selected(switches, *case)
        for way in (1, 2):
            switches.order(way)
            assert all(map(torch.equal, selected(switches, *case), wanted)), way
        switches.order(0)


@pytest.mark.parametrize(("file", "line"), BARRIERS)
def test_a_missing_barrier_is_seen(switches: shim.OnCpu, file: str, line: int) -> None:
    passed = 0
    for case in cases():
        wanted = selected(switches, *case)
        for way in (1, 2, 0):
            switches.order(way)
            switches.without_barrier(file, line)
            try:
                seen = not all(map(torch.equal, selected(switches, *case), wanted))
            except RuntimeError as error:
                seen = "cuda_on_cpu: block" in str(error)
            passed += switches.without_barrier("", 0)
            switches.order(0)
            if seen:
                return
    pytest.fail(f"passed {passed} times without it, and nothing was wrong")
