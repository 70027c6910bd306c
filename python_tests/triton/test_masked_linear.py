"""Products with packed weights in Triton's interpreter: every kernel, against float64 dense."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import paikern as pk
from paikern import ops
from python_tests.ops.masked_linear_cases import DENSITIES, DTYPES, Case, check, error, make
from python_tests.triton.helpers import both, on

pytestmark = pytest.mark.triton

FORMATS = ("index", "bitmap")
SHAPES = ((1, 1), (31, 33), (33, 70), (1, 300), (300, 1))
# Rows of x: gathered, one and several blocks of the others.
BATCHES = (1, 3, 16, 65)


def ids(value: object) -> str:
    return str(value).replace("torch.", "").replace(", ", "x").strip("()")


@contextlib.contextmanager
def only(kernel: str) -> Iterator[None]:
    """Listed positions go by entries, decoded, or to the library, whatever the table says."""
    from paikern.backends.triton import masked

    before = dict(masked.CHOICES)
    of = {"index": (1.0, 2**31), "decode": (-1.0, 2**31), "library": (-1.0, 0)}
    try:
        masked.CHOICES.update(dict.fromkeys(before, masked.Choice(*of[kernel])))
        yield
    finally:
        masked.CHOICES.update(before)


def random(batch: int, case: Case) -> Tensor:
    return torch.randn(batch, case.dense.shape[1]).to(case.dense.dtype)


@pytest.mark.parametrize("kernel", ["index", "decode", "library"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_masked_linear_by_each_kernel(shape: tuple[int, int], kernel: str) -> None:
    # Every other density, so that each kernel meets all of them.
    for at, density in enumerate(DENSITIES[SHAPES.index(shape) % 2 :: 2]):
        case = make(*shape, density)
        with only(kernel):
            on("triton", lambda c=case, b=BATCHES[at + 1]: check(c, random(b, c), bias=b % 2 == 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.9])
def test_masked_linear_of_each_type_and_format(
    dtype: torch.dtype, format: str, density: float
) -> None:
    case = make(33, 40, density, dtype, format=format)
    for batch in BATCHES:
        on("triton", lambda b=batch: check(case, random(b, case)))


@pytest.mark.parametrize("kernel", ["index", "decode"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_masked_linear_of_halves_by_each_kernel(dtype: torch.dtype, kernel: str) -> None:
    case = make(40, 33, 0.3, dtype)
    with only(kernel):
        for batch in (4, 5, 33):
            on("triton", lambda b=batch: check(case, random(b, case), bias=b == 5))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 65),
    st.floats(0, 1),
    st.sampled_from([1, 16, 64, 4096]),
    st.sampled_from(FORMATS),
)
def test_masked_linear_of_random_shapes(
    rows: int, columns: int, batch: int, density: float, panel: int, format: str
) -> None:
    def run() -> None:
        case = make(rows, columns, density, format=format, panel=panel)
        check(case, random(batch, case), bias=rows % 2 == 0)

    on("triton", run)


def test_masked_linear_of_several_tiles() -> None:
    for format, density in (("index", 0.03), ("bitmap", 0.7)):
        case = make(65, 300, density, format=format)
        on("triton", lambda c=case: check(c, random(33, c)))
    listed = make(130, 70, 0.4)
    on("triton", lambda: check(listed, random(17, listed)))


@pytest.mark.parametrize("shape", [(3, 700), (700, 3)], ids=ids)
def test_long_sums_of_few_tiles_are_added_in_parts(shape: tuple[int, int]) -> None:
    case = make(*shape, 0.5, format="bitmap")
    on("triton", lambda: check(case, random(17, case)))


@pytest.mark.parametrize("format", FORMATS)
def test_masked_linear_of_a_large_batch(format: str) -> None:
    case = make(20, 30, 0.5, torch.bfloat16, format=format)
    on("triton", lambda: check(case, random(520, case)))


@pytest.mark.parametrize(("columns", "panel"), [(65_537, 65_536), (140_000, 16_384)])
@pytest.mark.parametrize("batch", [2, 20])
def test_masked_linear_with_more_columns_than_16_bits(columns: int, panel: int, batch: int) -> None:
    case = make(3, columns, 0.002, panel=panel)
    values, where = case.packed.values.detach(), case.packed.where(transposed=False)
    x, g = random(batch, case), torch.randn(batch, 3)
    found = on("triton", lambda: torch.ops.paikern.masked_linear(x, values, case.bias, *where))
    linear = torch.nn.functional.linear
    assert error(found, linear(x.double(), case.dense.double(), case.bias.double())) < 1e-5
    kept = on("triton", lambda: torch.ops.paikern.masked_linear_kept(g, x, *where))
    assert error(kept, (g.double().T @ x.double())[case.mask]) < 1e-5


def test_masked_linear_takes_any_layout_of_x() -> None:
    case = make(33, 40, 0.2)
    for x in (
        torch.randn(40, 5).T,
        torch.randn(5, 80)[:, ::2],
        torch.randn(1, 40).expand(5, 40),
        torch.randn(2, 1, 3, 40),
        torch.randn(40),
    ):
        on("triton", lambda t=x: check(case, t))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "batch"), [(0, 5, 2), (5, 0, 2), (5, 7, 0), (0, 0, 3)])
def test_masked_linear_of_nothing(rows: int, columns: int, batch: int, format: str) -> None:
    def run() -> None:
        case = make(rows, columns, 1.0, format=format)
        x = torch.randn(batch, columns, requires_grad=True)
        for bias in (None, case.bias):
            y = ops.masked_linear(x, case.packed, bias)
            assert torch.equal(y, (torch.zeros(rows) if bias is None else bias).expand(batch, rows))
        by_x, by_values = torch.autograd.grad(y.sum(), (x, case.packed.values))
        assert torch.equal(by_x, torch.zeros(batch, columns))
        assert torch.equal(by_values, torch.zeros(case.packed.nnz))

    on("triton", run)


@pytest.mark.parametrize("format", FORMATS)
def test_pruned_weights_of_few_rows_multiply_nothing(format: str) -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    packed = pk.PackedWeight.from_dense(torch.ones(2, 3), mask, format=format)
    x = torch.ones(2, 3)
    x[:, 0] = torch.nan
    y = on("triton", lambda: ops.masked_linear(x, packed))
    assert bool(torch.isnan(y[:, 0]).all())
    assert y[:, 1].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("kernel", ["index", "decode"])
def test_masked_linear_has_the_same_bits_from_run_to_run(kernel: str) -> None:
    case = make(40, 50, 0.4)
    for batch in (2, 20):
        x, g = random(batch, case).requires_grad_(), torch.randn(batch, 40)

        def run(x: Tensor = x, g: Tensor = g) -> list[Tensor]:
            y = ops.masked_linear(x, case.packed, case.bias)
            return [y, *torch.autograd.grad(y, (x, case.packed.values), g)]

        with only(kernel):
            first, second = on("triton", run), on("triton", run)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_second_derivatives_equal_those_of_the_cpu(format: str) -> None:
    case = make(20, 30, 0.3, format=format)
    x, g = torch.randn(7, 30, requires_grad=True), torch.randn(7, 20)

    def second() -> tuple[Tensor, ...]:
        y = ops.masked_linear(x, case.packed).tanh()
        first = torch.autograd.grad(y, (x, case.packed.values), g, create_graph=True)
        total = sum(part.square().sum() for part in first)
        return torch.autograd.grad(total, (x, case.packed.values))

    for found, wanted in zip(*both(second), strict=True):
        assert error(found, wanted.double()) < 1e-5


def test_the_input_gradient_lists_the_transposed_positions_where_they_are_missing() -> None:
    case = make(33, 50, 0.2)
    values, g = case.packed.values.detach(), torch.randn(3, 33)
    where = case.packed.where(transposed=False)
    assert where[2] is None

    def run() -> Any:
        return torch.ops.paikern.masked_linear_input(g, values, *where)

    found, wanted = both(run)
    assert error(found, wanted.double()) < 1e-5


def test_the_table_of_choices() -> None:
    from paikern.backends.triton.masked import kernel_of

    assert kernel_of(False, 2, 0.5, 1) == "index"
    assert kernel_of(False, 2, 0.01, 4096) == "index"
    assert kernel_of(False, 2, 0.1, 64) == "decode"
    assert kernel_of(False, 4, 0.1, 64) == "index"
    assert kernel_of(True, 2, 0.01, 64) == "decode"
    assert kernel_of(True, 4, 0.9, 4096) == "library"
