"""Every barrier of a selection is needed, see `barriers`.

Compared are the masks and what the kernels leave in device memory: a wrong sample costs time, not a
wrong mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from paikern.backends.cuda_launch import provided
from paikern.backends.cuda_layers import dense
from paikern.backends.cuda_select import SelectionPlan
from python_tests.cuda_source import barriers, shim

pytestmark = pytest.mark.cuda_source
BARRIERS = barriers.of("select*.cuh")


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


def all_selected(on_cpu: shim.OnCpu) -> Iterator[list[Tensor]]:
    for case in cases():
        yield selected(on_cpu, *case)


@pytest.fixture(scope="module")
def missed() -> dict[tuple[str, int], bool]:
    return barriers.missed("python_tests.cuda_source.test_barriers")


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
    barriers.main(BARRIERS, all_selected)
