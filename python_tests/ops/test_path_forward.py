from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import BackendError
from python_tests.ops.path_cases import DTYPES, exact, ids, keep, within

SHAPES = [(1, 1), (31, 33), (33, 31), (1, 1000), (1000, 1), (257, 130), (70, 400)]
BATCHES = [None, 1, 2, 3, 4, 5, 17, 100]


def torchs(x: Tensor, values: Tensor) -> Tensor:
    return x @ values.float().T


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("batch", BATCHES, ids=ids)
@pytest.mark.parametrize("density", [None, 0.02, 0.5])
def test_path_forward_equals_the_definition(
    shape: tuple[int, int], batch: int | None, density: float | None
) -> None:
    weight = torch.randn(shape)
    x = torch.rand(shape[1]) if batch is None else torch.rand(batch, shape[1])
    mask, packed = keep(weight, density) if density else (None, None)
    for power in (0, 1, 2):
        values = exact(weight, power, mask)
        found = ops.path_forward(weight, x, power=power, mask=packed)
        within(found, torchs(x, values), x.double() @ values.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_path_forward_reads_half_weights_exactly(dtype: torch.dtype, batch: int) -> None:
    weight = (torch.randn(37, 83) * 10.0 ** torch.randint(-7, 4, (37, 83))).to(dtype)
    x = torch.rand(batch, 83)
    for power in (1, 2):
        values = exact(weight, power, None)
        found = ops.path_forward(weight, x, power=power)
        within(found, torchs(x, values), x.double() @ values.T)


def test_path_forward_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    packed = ops.pack_mask(torch.tensor([[True, False, True], [True, True, False]]))
    ones = torch.ones(3)
    assert ops.path_forward(weight, ones).tolist() == [3.5, 4.0]
    assert ops.path_forward(weight, ones, power=2).tolist() == [5.25, 10.0]
    assert ops.path_forward(weight, ones, power=0).tolist() == [3.0, 3.0]
    assert ops.path_forward(weight, ones, mask=packed).tolist() == [1.5, 3.0]
    assert ops.path_forward(weight, ones, power=0, mask=packed).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_path_forward_never_reads_what_is_masked(batch: int, density: float) -> None:
    weight = torch.randn(50, 70)
    mask, packed = keep(weight, density)
    poisoned = torch.where(mask, weight, torch.nan)
    x = torch.rand(batch, 70)
    found = ops.path_forward(poisoned, x, mask=packed)
    assert torch.equal(found, ops.path_forward(weight, x, mask=packed))
    nan = torch.full_like(weight, torch.nan)
    ones = torch.ones_like(weight)
    counts = ops.path_forward(nan, x, power=0, mask=packed)
    assert torch.equal(counts, ops.path_forward(ones, x, mask=packed))


def test_path_forward_takes_strided_tensors() -> None:
    weight, x = torch.randn(40, 60).T, torch.rand(60, 40)[::2, :]
    packed = ops.pack_mask((torch.rand(60, 40) < 0.5).T.contiguous().T)
    expected = ops.path_forward(weight.contiguous(), x.contiguous(), mask=packed)
    assert torch.equal(ops.path_forward(weight, x, mask=packed), expected)


@pytest.mark.parametrize(("rows", "columns", "batch"), [(0, 5, 2), (5, 0, 2), (5, 7, 0)])
def test_path_forward_of_nothing(rows: int, columns: int, batch: int) -> None:
    found = ops.path_forward(torch.randn(rows, columns), torch.rand(batch, columns))
    assert torch.equal(found, torch.zeros(batch, rows))


@pytest.mark.parametrize("batch", [1, 4, 33])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_path_forward_has_the_same_bits_for_any_number_of_threads(
    batch: int, density: float
) -> None:
    weight, x = torch.randn(700, 1600), torch.rand(batch, 1600)
    _, packed = keep(weight, density)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(ops.path_forward(weight, x, mask=packed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


def test_path_forward_rounds_alike_in_every_column() -> None:
    # batches beyond 4 run in tiles of 48: the same row anywhere gives the same bits
    weight, row = torch.randn(65, 500), torch.rand(500)
    for density in (0.1, 0.9):
        _, packed = keep(weight, density)
        found = ops.path_forward(weight, row.expand(131, 500), mask=packed)
        assert torch.equal(found, found[:1].expand_as(found))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.integers(1, 60), st.floats(0, 1))
def test_path_forward_dense_and_sparse_plans_agree(
    rows: int, columns: int, batch: int, density: float
) -> None:
    weight, x = torch.randn(rows, columns), torch.rand(batch, columns)
    mask, packed = keep(weight, density)
    values = exact(weight, 1, mask)
    found = ops.path_forward(weight, x, mask=packed)
    within(found, torchs(x, values), x.double() @ values.T)
    if batch > 4:  # a weight of zeros without a mask takes the dense plan: same sums, same order
        zeroed = torch.where(mask, weight, 0.0)
        assert torch.equal(found, ops.path_forward(zeroed, x))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_path_forward_gradcheck(power: int, masked: bool) -> None:
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    packed = keep(weight, 0.5)[1] if masked else None
    assert torch.autograd.gradcheck(
        lambda w, v: ops.path_forward(w, v, power=power, mask=packed), (weight, x)
    )
    assert torch.autograd.gradcheck(
        lambda w, v: ops.path_forward(w, v, power=power, mask=packed), (weight, x[0])
    )


def test_path_forward_native_gradients() -> None:
    weight = torch.randn(6, 9).bfloat16().requires_grad_()
    x = torch.rand(4, 9).half().requires_grad_()
    mask, packed = keep(weight, 0.5)
    ops.path_forward(weight, x, power=2, mask=packed).sum().backward()
    assert weight.grad is not None
    assert x.grad is not None
    slope = 2 * weight.detach().float() * mask * x.detach().float().sum(0)
    torch.testing.assert_close(weight.grad, slope.bfloat16())
    torch.testing.assert_close(x.grad, exact(weight.detach(), 2, mask).sum(0).expand(4, 9).half())


def test_path_forward_counts_paths_without_a_gradient_for_the_weight() -> None:
    weight, x = torch.randn(3, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    ops.path_forward(weight, x, power=0).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    assert x.grad.tolist() == [3.0] * 4


@pytest.mark.parametrize("power", [0, 1, 2])
def test_path_forward_opcheck(power: int) -> None:
    weight = torch.randn(5, 7, requires_grad=power > 0)
    x = torch.rand(6, 7, requires_grad=True)
    for packed in (None, keep(weight, 0.5)[1]):
        torch.library.opcheck(torch.ops.paikern.path_forward, (weight, x, power, packed))


def test_path_forward_compiles_and_follows_modes() -> None:
    weight, x = torch.randn(5, 7), torch.rand(6, 7)
    expected = ops.path_forward(weight, x)
    with torch.device("meta"):
        meta = ops.path_forward(torch.empty(5, 7), torch.empty(6, 7))
    assert meta.shape == expected.shape
    compiled = torch.compile(lambda w, v: ops.path_forward(w, v) + 1, backend="eager")
    assert torch.equal(compiled(weight, x), expected + 1)


def test_path_forward_in_float64_and_by_reference() -> None:
    weight, x = torch.randn(5, 7), torch.rand(6, 7, dtype=torch.float64)
    assert ops.path_forward(weight, x).dtype == torch.float64
    assert ops.path_forward(weight.double(), x.float()).dtype == torch.float64
    assert ops.path_forward(weight.double(), x.float(), power=0).dtype == torch.float32
    with registry.using("reference"):
        by_reference = ops.path_forward(weight, x.float())
    torch.testing.assert_close(by_reference, ops.path_forward(weight, x.float()))
    with registry.using("cpu"), pytest.raises(BackendError, match="float64"):
        ops.path_forward(weight, x)


def test_path_forward_names_what_is_wrong() -> None:
    weight, x = torch.randn(5, 7), torch.rand(7)
    with pytest.raises(ValueError, match=r"path_forward: x must be \[7\] or \[batch, 7\]"):
        ops.path_forward(weight, torch.rand(5))
    with pytest.raises(ValueError, match=r"weight must be \[out, in\], got shape \(7,\)"):
        ops.path_forward(x, x)
    with pytest.raises(ValueError, match="power must be 0, 1 or 2, got 3"):
        ops.path_forward(weight, x, power=3)
    with pytest.raises(TypeError, match="weight must be a float tensor"):
        ops.path_forward(weight.int(), x)
    with pytest.raises(TypeError, match="x must be a float tensor"):
        ops.path_forward(weight, x.int())
    with pytest.raises(ValueError, match="holds 8 bits, 35 are needed"):
        ops.path_forward(weight, x, mask=torch.zeros(1, dtype=torch.uint8))
