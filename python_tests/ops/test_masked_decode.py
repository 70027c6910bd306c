"""Products of a packed weight through rows made dense, and which kernel is taken when."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paikern as pk
from paikern import ops
from paikern.backends import cpu_masked_decode, masked_cost
from python_tests.ops.masked_linear_cases import DENSITIES, DTYPES, check, make


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes that path for every product, in blocks of a few rows; counts the blocks."""
    blocks: list[int] = []
    original = cpu_masked_decode._blocks

    def counted(rows: int, columns: int):
        for first, block in original(rows, columns):
            blocks.append(first)
            yield first, block

    monkeypatch.setattr(masked_cost, "cpu_kernel", lambda *args: "decode")
    monkeypatch.setattr(cpu_masked_decode, "BLOCK", 1 << 10)
    monkeypatch.setattr(cpu_masked_decode, "_blocks", counted)
    monkeypatch.setattr(cpu_masked_decode, "_memory", threading.local())
    return blocks


@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("density", DENSITIES)
def test_decoded_rows_give_the_same_products(
    decoded: list[int], format: str, density: float
) -> None:
    torch.manual_seed(0)
    for rows, columns in ((1, 1), (31, 33), (33, 300), (300, 31), (257, 130)):
        case = make(rows, columns, density, format=format)
        for batch in (1, 3, 33):
            check(case, torch.randn(batch, columns), bias=batch != 3)
    assert max(decoded) > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["index", "bitmap"])
def test_decoded_rows_in_every_dtype(decoded: list[int], dtype: torch.dtype, format: str) -> None:
    torch.manual_seed(0)
    case = make(70, 90, 0.6, dtype, format=format)
    for x in (torch.randn(40, 90), torch.randn(90, 5).T, torch.randn(2, 3, 90), torch.randn(90)):
        check(case, x.to(dtype))
    assert decoded


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 65),
    st.floats(0, 1),
    st.sampled_from(["index", "bitmap"]),
    st.sampled_from([16, 4096]),
    st.integers(0, 2**31),
)
def test_decoded_rows_of_random_shapes(
    rows: int, columns: int, batch: int, density: float, format: str, panel: int, seed: int
) -> None:
    torch.manual_seed(seed)
    case, x = make(rows, columns, density, format=format, panel=panel), torch.randn(batch, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked_cost, "cpu_kernel", lambda *args: "decode")
        patch.setattr(cpu_masked_decode, "BLOCK", 1 << 10)
        check(case, x)


@pytest.mark.parametrize(("rows", "columns", "batch"), [(0, 5, 2), (5, 0, 2), (5, 7, 0), (0, 0, 3)])
def test_decoded_rows_of_nothing(decoded: list[int], rows: int, columns: int, batch: int) -> None:
    case, x = make(rows, columns, 1.0), torch.randn(batch, columns, requires_grad=True)
    bias = case.bias.requires_grad_()
    y = ops.masked_linear(x, case.packed, bias)
    assert torch.equal(y, bias.expand(batch, rows))
    by_x, by_values, by_bias = torch.autograd.grad(y.sum(), (x, case.packed.values, bias))
    assert torch.equal(by_x, torch.zeros(batch, columns))
    assert torch.equal(by_values, torch.zeros(case.packed.nnz))
    assert torch.equal(by_bias, torch.full((rows,), float(batch)))


def test_decoded_rows_spread_no_nan(decoded: list[int]) -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    packed = pk.PackedWeight.from_dense(torch.ones(2, 3), mask)
    x = torch.ones(4, 3, requires_grad=True)
    with torch.no_grad():
        x[:, 0] = torch.inf
    y = ops.masked_linear(x, packed)
    assert y.tolist() == [[torch.inf, 2.0]] * 4
    g = torch.tensor([[1.0, torch.nan]] * 4)
    by_x, by_values = torch.autograd.grad(y, (x, packed.values), g)
    assert by_x[:, 0].tolist() == [1.0] * 4  # column 0 is kept in row 0 alone
    assert by_values[0] == torch.inf
    assert by_values[1] == 4.0
    assert bool(torch.isnan(by_values[2:]).all())


def test_decoded_rows_keep_their_memory_for_the_next_call(decoded: list[int]) -> None:
    torch.manual_seed(0)
    case, x = make(50, 60, 0.5), torch.randn(7, 60)
    first = ops.masked_linear(x, case.packed)
    address = cpu_masked_decode._memory.block.data_ptr()
    assert torch.equal(ops.masked_linear(x, case.packed), first)
    assert cpu_masked_decode._memory.block.data_ptr() == address
    assert cpu_masked_decode._memory.block.numel() <= cpu_masked_decode.BLOCK


def test_a_large_weight_that_keeps_much_is_decoded_unasked() -> None:
    torch.manual_seed(0)
    rows, columns, batch = 300, 310, 3000
    kept = int(0.9 * rows * columns)
    assert masked_cost.cpu_kernel(rows, columns, kept, batch) == "decode"
    assert masked_cost.cpu_kernel(rows, columns, kept // 50, batch) == "index"
    for format in ("index", "bitmap"):
        check(make(rows, columns, 0.9, format=format), torch.randn(batch, columns))


def test_estimates_say_which_kernel_and_why() -> None:
    sparse = masked_cost.estimate("cpu", 4096, 4096, 167_772, 256)
    assert sparse.kernel == "index"
    assert sparse.seconds is not None
    assert sparse.dense_seconds is not None
    assert sparse.seconds < sparse.dense_seconds / 4
    full = masked_cost.estimate("cpu", 4096, 4096, 4096 * 4096, 256, training=True)
    assert full.kernel == "dense"
    assert full.seconds == full.dense_seconds
    assert "would take" in full.why
    for batch in (1, 32, 256, 4096):
        found = [
            masked_cost.estimate("cpu", 1000, 1000, kept, batch)
            for kept in (1000, *range(150_000, 1_000_001, 50_000))  # two threads from 131,072 on
        ]
        times = [one.seconds for one in found if one.kernel == "index" and one.seconds is not None]
        assert times == sorted(times)  # who keeps more never takes less
        kernels = [one.kernel for one in found]
        assert kernels[0] == "index"
        assert kernels[-1] != "index"
        assert all(time <= masked_cost.LOSS * (found[0].dense_seconds or 0) for time in times)
    wide = masked_cost.estimate("cpu", 10, 10, 5, 1, dtype=torch.float64)
    assert wide.kernel == "dense"
    gpu = masked_cost.estimate("cuda", 4096, 4096, 1000, 1)
    assert gpu.seconds is gpu.dense_seconds is None
    assert "not yet measured" in gpu.why


def test_estimates_of_nothing() -> None:
    for rows, columns, batch in ((0, 5, 3), (5, 0, 3), (5, 5, 0), (0, 0, 0)):
        found = masked_cost.estimate("cpu", rows, columns, 0, batch, training=True)
        assert found.kernel in ("index", "decode", "dense")
        assert masked_cost.cpu_kernel(rows, columns, 0, batch) in ("index", "decode")
