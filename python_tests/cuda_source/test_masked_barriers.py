"""Every barrier of the kernels of packed weights is needed, see `barriers`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from paikern.backends import cuda_masked_linear, cuda_positions
from paikern.backends.cuda_launch import provided
from python_tests.cuda_source import barriers, shim
from python_tests.cuda_source.masked_calls import kernel_of, make, of_backend

pytestmark = pytest.mark.cuda_source
BARRIERS = barriers.of("masked*.cuh")


def products(on_cpu: shim.OnCpu) -> Iterator[list[Tensor]]:
    """Calls that between them pass every barrier; shapes change, so that what is left is wrong."""
    torch.manual_seed(5)
    for rows, columns, batch in ((30, 70, 40), (17, 90, 70), (21, 200, 9)):
        case = make(rows, columns, 0.4)
        x, g = torch.randn(batch, columns), torch.randn(batch, rows)
        with provided(on_cpu), kernel_of("index"):
            yield of_backend(case, x, g)
    for columns, batch in ((300, 12), (700, 30)):
        case = make(40, columns, 0.6, torch.bfloat16, format="bitmap")
        where = case.packed.where(transposed=False)
        x, values = torch.randn(batch, columns).bfloat16(), case.packed.values.detach()
        with provided(on_cpu), kernel_of("decode"):
            yield [cuda_masked_linear.masked_linear(x, values, None, *where)]
    for rows in (40, 33):
        case = make(rows, 300, 0.5)
        where = case.packed.where(transposed=False)
        with provided(on_cpu):
            yield list(cuda_positions.transpose_positions(*where[:2], rows, 300, 4096))
            values = case.packed.values.detach()
            yield [cuda_positions.scatter_kept(values, *where[:2], *where[5:])]


@pytest.fixture(scope="module")
def missed() -> dict[tuple[str, int], bool]:
    return barriers.missed("python_tests.cuda_source.test_masked_barriers")


@pytest.fixture
def ordered(on_cpu: shim.OnCpu) -> Iterator[shim.OnCpu]:
    yield on_cpu
    on_cpu.order(0)


def test_results_do_not_depend_on_the_order_of_warps(ordered: shim.OnCpu) -> None:
    wanted = list(products(ordered))
    for way in (1, 2):
        ordered.order(way)
        for found, right in zip(products(ordered), wanted, strict=True):
            assert all(map(torch.equal, found, right)), way


def test_with_all_barriers_nothing_is_wrong(missed: dict[tuple[str, int], bool]) -> None:
    assert missed["none", 1] is False
    assert len(BARRIERS) >= 8


@pytest.mark.parametrize(("file", "line"), BARRIERS)
def test_a_missing_barrier_is_seen(
    missed: dict[tuple[str, int], bool], file: str, line: int
) -> None:
    assert missed[file, line]


if __name__ == "__main__":
    barriers.main(BARRIERS, products)
