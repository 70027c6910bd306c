from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paikern as pk
from paikern import ops
from paikern.backends import registry

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.uint8,
    torch.int64,
    torch.complex128,
)


def where_of(mask: Tensor, panel: int, bits: bool) -> tuple:
    rows, columns = mask.shape
    packed, kept = ops.pack_mask(mask), int(mask.sum())
    positions, starts = ops.list_positions(packed, kept, rows, columns, panel)
    return packed if bits else positions, starts, rows, columns, panel, kept


def random(*size: int, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(size).to(dtype)
    return torch.randint(1, 100, size, dtype=dtype)


def check(dense: Tensor, mask: Tensor, panel: int, bits: bool) -> None:
    where = where_of(mask, panel, bits)
    values = ops.gather_kept(dense, *where)
    assert torch.equal(values, dense[mask])
    assert torch.equal(ops.scatter_kept(values, *where), torch.where(mask, dense, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [False, True], ids=["index", "bitmap"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_scatter_and_gather_equal_the_definition(
    dtype: torch.dtype, bits: bool, density: float
) -> None:
    torch.manual_seed(0)
    for rows, columns in ((1, 1), (31, 33), (33, 300), (300, 31), (0, 5), (5, 0)):
        check(random(rows, columns, dtype=dtype), torch.rand(rows, columns) < density, 4096, bits)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from([1, 16, 4096]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_scatter_and_gather_of_random_shapes(
    rows: int, columns: int, density: float, panel: int, bits: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    dense = torch.randn(columns, rows).T  # not contiguous
    check(dense, torch.rand(rows, columns) < density, panel, bits)


@pytest.mark.parametrize("bits", [False, True], ids=["index", "bitmap"])
def test_scatter_with_more_columns_than_16_bits(bits: bool) -> None:
    torch.manual_seed(0)
    for columns, panel in ((65_536, 4096), (65_537, 65_536), (140_000, 4096), (140_000, 65_536)):
        check(torch.randn(5, columns), torch.rand(5, columns) < 0.1, panel, bits)


def test_scatter_of_a_large_weight_by_threads() -> None:
    torch.manual_seed(0)
    for bits in (False, True):
        check(torch.randn(1500, 1111), torch.rand(1500, 1111) < 0.2, 4096, bits)


def test_scatter_takes_values_of_any_stride_and_the_reference_agrees() -> None:
    torch.manual_seed(0)
    mask = torch.rand(20, 30) < 0.3
    where = where_of(mask, 16, False)
    values = torch.randn(2 * where[-1])[::2]
    native = ops.scatter_kept(values, *where)
    with registry.using("reference"):
        assert torch.equal(ops.scatter_kept(values, *where), native)
        assert torch.equal(ops.gather_kept(native, *where), values)


@pytest.mark.parametrize("bits", [False, True], ids=["index", "bitmap"])
def test_each_is_the_derivative_of_the_other(bits: bool) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    where = where_of(mask, 2, bits)
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    for function, leaf in ((ops.scatter_kept, values), (ops.gather_kept, dense)):
        assert torch.autograd.gradcheck(lambda t, f=function: f(t, *where).square(), leaf)
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t, *where).square(), leaf)


@pytest.mark.parametrize("bits", [False, True], ids=["index", "bitmap"])
def test_scatter_compiles_without_graph_breaks(bits: bool) -> None:
    torch._dynamo.reset()
    where = where_of(torch.rand(8, 12) < 0.4, 4096, bits)
    values = torch.randn(where[-1], requires_grad=True)
    compiled = torch.compile(
        lambda v: ops.scatter_kept(v, *where) * 2, fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(values).square().sum(), values)[0]
    assert torch.equal(found, 8 * values.detach())


def test_a_packed_weight_made_dense() -> None:
    torch.manual_seed(0)
    weight, mask = torch.randn(7, 9), torch.rand(7, 9) < 0.5
    for format in ("index", "bitmap"):
        packed = pk.PackedWeight.from_dense(weight, mask, format=format)
        dense = packed.to_dense()
        assert torch.equal(dense, weight * mask)
        by_values = torch.autograd.grad((dense * weight).sum(), packed.values)[0]
        assert torch.equal(by_values, weight[mask])


def test_scatter_and_gather_name_what_is_wrong() -> None:
    mask = torch.rand(4, 6) < 0.5
    positions, starts, *sizes = where_of(mask, 4096, False)
    values, kept = torch.zeros(sizes[-1]), sizes[-1]
    with pytest.raises(ValueError, match=rf"scatter_kept: values must be \[{kept}\], got \(3,\)"):
        ops.scatter_kept(torch.zeros(3), positions, starts, *sizes)
    with pytest.raises(ValueError, match=r"gather_kept: dense must be \[4, 6\], got \(6, 4\)"):
        ops.gather_kept(torch.zeros(6, 4), positions, starts, *sizes)
    with pytest.raises(ValueError, match=r"scatter_kept: starts must be \[5\] for \[4, 6\]"):
        ops.scatter_kept(values, positions, starts[1:], *sizes)
    with pytest.raises(ValueError, match=rf"scatter_kept: positions must be \[{kept}\]"):
        ops.scatter_kept(values, positions[1:], starts, *sizes)
    with pytest.raises(TypeError, match="positions must be int16 columns or packed bits"):
        ops.scatter_kept(values, positions.int(), starts, *sizes)
    with pytest.raises(ValueError, match="panel must be a power of two up to 65536, got 12"):
        ops.gather_kept(torch.zeros(4, 6), positions, starts, 4, 6, 12, kept)
