"""masked_linear by bitmap and tensor cores, on the CUDA sources."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paikern as pk
from paikern import ops
from python_tests.cuda_source.masked_calls import kernel, make
from python_tests.ops.masked_linear_cases import DENSITIES, Case, within

pytestmark = pytest.mark.cuda_source
HALVES = (torch.bfloat16, torch.float16)


def forward(case: Case, x: Tensor, bias: Tensor | None) -> Tensor:
    with kernel("decode"), torch.no_grad():
        return ops.masked_linear(x, case.packed, bias)


def small_numbers(rows: int, columns: int, density: float, batch: int, dtype: torch.dtype) -> None:
    """Whole numbers, whose sums are exact: every product has to be the right one."""
    weight = torch.randint(-3, 4, (rows, columns)).to(dtype)
    mask = torch.rand(rows, columns) < density
    packed = pk.PackedWeight.from_dense(weight, mask, format="bitmap", panel=32)
    x = torch.randint(-3, 4, (batch, columns)).to(dtype)
    found = forward(Case(packed, weight, mask, x), x, None)
    assert torch.equal(found, (x.float() @ (weight * mask).float().T).to(dtype))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("batch", [1, 8, 9, 30, 64])
def test_every_density_and_batch(density: float, batch: int) -> None:
    for index, (rows, columns) in enumerate(((1, 1), (33, 31), (70, 300), (16, 512))):
        dtype = HALVES[(index + batch) % 2]
        case = make(rows, columns, density, dtype, format="bitmap")
        x, bias = torch.randn(batch, columns).to(dtype), case.bias if batch % 2 else None
        truth = torch.nn.functional.linear(
            x.double(), case.dense.double(), None if bias is None else bias.double()
        )
        within(forward(case, x, bias), torch.nn.functional.linear(x, case.dense, bias), truth)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.floats(0, 1))
def test_sums_of_whole_numbers_are_exact(
    rows: int, columns: int, batch: int, density: float
) -> None:
    small_numbers(rows, columns, density, batch, HALVES[rows % 2])


@pytest.mark.parametrize("columns", [512, 640, 1000, 70_000])
def test_panels_are_shared_by_blocks(columns: int) -> None:
    small_numbers(3, columns, 0.3, 5, torch.bfloat16)
    small_numbers(2, columns, 0.9, 17, torch.float16)


def test_values_mask_and_x_may_begin_anywhere() -> None:
    case = make(40, 96, 0.6, torch.bfloat16, format="bitmap")
    bits, starts, *_, rows, columns, panel, kept = case.packed.where(transposed=False)
    values, x = case.packed.values.detach(), torch.randn(9, 96).bfloat16()

    def moved(tensor: Tensor) -> Tensor:
        room = tensor.new_empty(tensor.numel() + 1)
        room[1:] = tensor.reshape(-1)
        return room[1:].view(tensor.shape)

    where = (None, None, None, rows, columns, panel, kept)
    linear = torch.ops.paikern.masked_linear
    with kernel("decode"):
        wanted = linear(x, values, case.bias, bits, starts, *where)
        found = linear(moved(x), moved(values), case.bias, moved(bits), starts, *where)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("batch", [3, 40])
def test_the_same_bits_from_run_to_run(batch: int) -> None:
    case = make(33, 1100, 0.4, torch.bfloat16, format="bitmap", panel=64)
    x = torch.randn(batch, 1100).bfloat16()
    assert torch.equal(forward(case, x, case.bias), forward(case, x, case.bias))


def test_rows_of_x_do_not_meet() -> None:
    """A row of x has the same result alone as among others, whatever those hold."""
    case = make(20, 100, 0.7, torch.float16, format="bitmap")
    x = torch.randn(7, 100).half()
    x[1:] = torch.inf
    assert torch.equal(forward(case, x, None)[:1], forward(case, x[:1], None))


def test_the_table_takes_bitmaps_of_halves() -> None:
    from paikern.backends.cuda_masked_linear import choose

    case = make(40, 50, 0.7, torch.bfloat16, format="bitmap")
    found = case.packed.where(transposed=False)
    where = (*found[:2], *found[5:])
    assert choose("output", where, torch.bfloat16, 64) == "decode"
    assert choose("output", where, torch.bfloat16, 65) == "dense"
    assert choose("output", where, torch.float32, 5) == "dense"
    assert choose("output", where, torch.float32, 4) == "index"
