"""Products with packed weights by the CUDA sources: against float64, in every regime."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paikern as pk
from paikern import ops
from paikern.backends import cuda_masked_linear, registry
from python_tests.cuda_source.masked_calls import SHAPES, checked, kernel, make, of
from python_tests.ops.masked_linear_cases import DENSITIES, DTYPES, check, error

pytestmark = pytest.mark.cuda_source
KERNELS = ("index", "dense")


def ids(value: object) -> str:
    return str(value).replace("torch.", "").replace(", ", "x").strip("()")


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("density", DENSITIES)
def test_masked_linear_by_index(shape: tuple[int, int], density: float) -> None:
    case = make(*shape, density, panel=16 if shape[1] % 2 else 4096)
    for batch in (1, 2, 3, 5, 8, 33, 65):
        checked("index", case, torch.randn(batch, shape[1]), bias=batch % 2 == 0)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
def test_masked_linear_in_every_dtype_and_format(
    name: str, dtype: torch.dtype, format: str, density: float
) -> None:
    case = make(35, 90, density, dtype, format=format, panel=32)
    for batch in (1, 2, 4, 9, 40):
        checked(name, case, torch.randn(batch, 90).to(dtype))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 65),
    st.floats(0, 1),
    st.sampled_from([1, 16, 64, 4096]),
    st.sampled_from(["index", "bitmap"]),
)
def test_masked_linear_of_random_shapes(
    rows: int, columns: int, batch: int, density: float, panel: int, format: str
) -> None:
    dtype = DTYPES[(rows + columns) % 3]
    case = make(rows, columns, density * density, dtype, panel=panel, format=format)
    checked("index", case, torch.randn(batch, columns).to(dtype), bias=rows % 2 == 0)


@pytest.mark.parametrize("columns", [65_535, 65_537, 140_000])
@pytest.mark.parametrize("panel", [4096, 65_536])
def test_masked_linear_with_more_columns_than_16_bits(columns: int, panel: int) -> None:
    case = make(2, columns, 0.003, panel=panel)
    for batch in (1, 9):
        checked("index", case, torch.randn(batch, columns))


def test_masked_linear_by_bits_with_more_columns_than_16_bits() -> None:
    case = make(2, 70_000, 0.3, panel=4096, format="bitmap")
    x = torch.randn(2, 70_000)
    with kernel("index"):
        found = ops.masked_linear(x, case.packed)
    truth = x.double() @ case.dense.double().T
    assert error(found.detach(), truth) < 1e-5


def test_masked_linear_with_more_rows_than_16_bits() -> None:
    case = make(70_000, 2, 0.02)
    for batch in (1, 5):
        x, g = torch.randn(batch, 2), torch.randn(batch, 70_000)
        with kernel("index"):
            _, by_x, _ = of(case, x, g)
        assert error(by_x, g.double() @ case.dense.double()) < 1e-5


@pytest.mark.parametrize(
    ("rows", "columns", "batch"), [(0, 5, 2), (5, 0, 2), (5, 7, 0), (0, 0, 0), (0, 0, 3)]
)
@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("name", KERNELS)
def test_masked_linear_of_nothing(
    rows: int, columns: int, batch: int, format: str, name: str
) -> None:
    with kernel(name):
        case = make(rows, columns, 1.0, format=format)
        x = torch.randn(batch, columns, requires_grad=True)
        for bias in (None, case.bias):
            y = ops.masked_linear(x, case.packed, bias)
            assert torch.equal(y, (torch.zeros(rows) if bias is None else bias).expand(batch, rows))
        by_x, by_values = torch.autograd.grad(y.sum(), (x, case.packed.values))
    assert torch.equal(by_x, torch.zeros(batch, columns))
    assert torch.equal(by_values, torch.zeros(case.packed.nnz))


@pytest.mark.parametrize("format", ["index", "bitmap"])
def test_by_index_a_pruned_weight_multiplies_nothing(format: str) -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    packed = pk.PackedWeight.from_dense(torch.ones(2, 3), mask, format=format)
    for batch in (1, 2, 20):
        x = torch.ones(batch, 3)
        x[:, 0] = torch.nan
        with kernel("index"):
            y = ops.masked_linear(x, packed)
        assert bool(torch.isnan(y[:, 0]).all())
        assert y[:, 1].tolist() == [2.0] * batch


@pytest.mark.parametrize("batch", [1, 3, 40, 200])
def test_masked_linear_takes_any_layout(batch: int) -> None:
    case = make(20, 30, 0.3)
    for x in (torch.randn(30, batch).T, torch.randn(batch, 60)[:, ::2], torch.randn(2, batch, 30)):
        checked("index", case, x)
    checked("index", case, torch.randn(30))


@pytest.mark.parametrize("batch", [1, 4, 6, 70])
def test_values_and_positions_may_begin_anywhere(batch: int) -> None:
    case = make(12, 300, 0.4)
    positions, starts, *back, rows, columns, panel, kept = case.packed.where(transposed=True)

    def moved(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:1], tensor])[1:]  # contiguous, one element off

    where = (moved(positions), moved(starts), *map(moved, back), rows, columns, panel, kept)
    values, x, g = case.packed.values.detach(), torch.randn(batch, 300), torch.randn(batch, 12)
    with kernel("index"):
        wanted = of(case, x, g)
        operations = torch.ops.paikern
        found = [
            operations.masked_linear(moved(x), moved(values), case.bias, *where),
            operations.masked_linear_input(moved(g), moved(values), *where),
            operations.masked_linear_kept(g, x, *where),
        ]
    rows_of_x = moved(x).shape[0]
    assert torch.equal(found[0], wanted[0][:rows_of_x])
    assert torch.equal(found[1:][1], wanted[2])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("batch", [1, 40])
def test_the_same_bits_from_run_to_run(name: str, format: str, batch: int) -> None:
    case = make(40, 700, 0.3, format=format, panel=64)
    x, g = torch.randn(batch, 700), torch.randn(batch, 40)
    with kernel(name):
        first = of(case, x, g)
        assert all(map(torch.equal, first, of(case, x, g)))


def test_rounding_is_to_the_nearest_even() -> None:
    """One weight of one: what comes out is x rounded, subnormals, infinities and NaN included."""
    special = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e-8, 2.0**-25, 2.0**-24 * 1.5, 6.1e-5]
    x = torch.tensor([*special, 1e30, float("inf"), float("nan"), *torch.randn(500).tolist()])
    x = torch.cat([x, -x, torch.randn(500) * 1e-6])
    packed = pk.PackedWeight.from_dense(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
    where = packed.where(transposed=True)
    for dtype in (torch.bfloat16, torch.float16):
        # Two halves whose sum is exact in float32: the second rounding is the kernel's own.
        high = x.to(dtype)
        pair = torch.stack([high, (x - high.float()).nan_to_num(0, 0, 0).to(dtype)], 1)
        ones = torch.ones(1, 2, dtype=dtype)
        two = pk.PackedWeight.from_dense(ones, torch.ones(1, 2, dtype=torch.bool))
        with kernel("index"):
            found = ops.masked_linear(pair, two)[:, 0]
        wanted = pair.float().sum(1).to(dtype)
        assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
        assert torch.equal(found.isnan(), wanted.isnan())
    assert where[-1] == 1


def test_double_backward_equals_that_of_the_reference() -> None:
    case = make(20, 30, 0.3)
    x, g = torch.randn(7, 30, requires_grad=True), torch.randn(7, 20)

    def second() -> tuple[Tensor, ...]:
        y = ops.masked_linear(x, case.packed).tanh()
        first = torch.autograd.grad(y, (x, case.packed.values), g, create_graph=True)
        total = sum(part.square().sum() for part in first)
        return torch.autograd.grad(total, (x, case.packed.values))

    with kernel("index"):
        found = second()
    with registry.using("reference"):
        wanted = second()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_another_dtype_of_the_values_is_widened() -> None:
    case = make(9, 40, 0.5)
    where, values = case.packed.where(transposed=True), case.packed.values.detach()
    x, g = torch.randn(3, 40).bfloat16(), torch.randn(3, 9).bfloat16()
    operations = torch.ops.paikern
    with registry.using("cuda_source"):
        y = operations.masked_linear(x, values, case.bias, *where)
        by_x = operations.masked_linear_input(g, values, *where)
        by_values = operations.masked_linear_kept(g.float(), x, *where)
    wide = x.float() @ case.dense.T + case.bias
    assert torch.equal(y, wide.bfloat16()) or torch.allclose(y.float(), wide, rtol=1e-2)
    assert (y.dtype, by_x.dtype, by_values.dtype) == (x.dtype, g.dtype, torch.float32)
    torch.testing.assert_close(by_values, (g.float().T @ x.float())[case.mask])
    torch.testing.assert_close(by_x.float(), g.float() @ case.dense, rtol=1e-2, atol=1e-2)


def test_a_gradient_is_dense_for_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(33, 50, 0.4)
    x, g = torch.randn(6, 50), torch.randn(6, 33)
    for format in ("index", "bitmap"):
        packed = pk.PackedWeight.from_dense(case.dense, case.mask, format=format)
        monkeypatch.setattr(cuda_masked_linear, "_ROW_BLOCK", 4 * 50)
        with kernel("dense"):
            found = torch.ops.paikern.masked_linear_kept(g, x, *packed.where(transposed=False))
        torch.testing.assert_close(found, (g.T @ x)[case.mask])


@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("density", [0.02, 0.08, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_masked_linear_as_the_table_has_it(format: str, density: float, dtype: torch.dtype) -> None:
    case = make(70, 130, density, dtype, format=format, panel=64)
    with registry.using("cuda_source"):
        for batch in (1, 4, 5, 33, 64, 65):
            check(case, torch.randn(batch, 130).to(dtype), bias=batch % 2 == 0)


def test_the_table_has_a_kernel_for_everything() -> None:
    for format in ("index", "bitmap"):
        for density in (0.0, 0.02, 0.3, 1.0):
            where = make(40, 50, density, format=format).packed.where(transposed=False)
            place = (*where[:2], *where[5:])
            for dtype in DTYPES:
                for batch in (1, 4, 5, 64, 65, 4096):
                    for operation in ("output", "input", "kept"):
                        found = cuda_masked_linear.choose(operation, place, dtype, batch)
                        assert found in ("index", "decode", "dense")
    assert all(rule.measured for rule in cuda_masked_linear.RULES)
    sparse = make(300, 300, 0.01).packed.where(transposed=False)
    assert (
        cuda_masked_linear.choose("output", (*sparse[:2], *sparse[5:]), DTYPES[0], 999) == "index"
    )
    full = make(300, 300, 0.5).packed.where(transposed=False)
    assert cuda_masked_linear.choose("kept", (*full[:2], *full[5:]), DTYPES[0], 999) == "dense"
