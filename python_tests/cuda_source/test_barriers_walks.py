"""Every barrier of kept walks and balanced masks is needed, see `barriers`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from paikern.backends import cuda_balanced_mask, cuda_phew
from paikern.backends.cuda_launch import provided
from python_tests.cuda_source import barriers, shim

pytestmark = pytest.mark.cuda_source
BARRIERS = barriers.of("phew*.cuh", "balanced_mask.cuh", "block_scan.cuh")


def results(on_cpu: shim.OnCpu) -> Iterator[list[Tensor]]:
    """Bits and states of kept walks, and masks, that between them pass every barrier."""
    generator = torch.Generator().manual_seed(1)
    walks = torch.randint(0, 4000, (1700, 12), generator=generator)
    for target in (2000, 3500, 3990):
        bits, state = torch.zeros(500, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
        with provided(on_cpu):
            cuda_phew.phew_keep_(bits, state, walks, target, 1, True)
        yield [bits, state]
    rows = torch.randint(300, 700, (40,), generator=generator)
    for cover in (-1, 20):
        with provided(on_cpu):
            grid = (1, 40, 700, 1)
            mask = cuda_balanced_mask.balanced_mask(rows, torch.empty(0), grid, False, cover, 5, 3)
        yield [mask]


@pytest.fixture(scope="module")
def missed() -> dict[barriers.Barrier, bool]:
    return barriers.missed("python_tests.cuda_source.test_barriers_walks")


def test_with_all_barriers_nothing_is_wrong(missed: dict[barriers.Barrier, bool]) -> None:
    assert missed["none", 1] is False
    assert len(BARRIERS) > 5


@pytest.mark.parametrize(("file", "line"), BARRIERS)
def test_a_missing_barrier_is_seen(
    missed: dict[barriers.Barrier, bool], file: str, line: int
) -> None:
    assert missed[file, line]


if __name__ == "__main__":
    barriers.main(BARRIERS, results)
