from __future__ import annotations

import pytest
import torch

from paikern import ops
from python_tests.ops.path_cases import DTYPES, exact, ids, keep, within

SHAPES = [(1, 1), (31, 33), (33, 31), (1, 1000), (1000, 1), (600, 130), (70, 2100)]
BATCHES = [None, 1, 2, 3, 4, 5, 17, 100]


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("batch", BATCHES, ids=ids)
@pytest.mark.parametrize("density", [None, 0.02, 0.5])
def test_path_backward_equals_the_definition(
    shape: tuple[int, int], batch: int | None, density: float | None
) -> None:
    weight = torch.randn(shape)
    g = torch.rand(shape[0]) if batch is None else torch.rand(batch, shape[0])
    mask, packed = keep(weight, density) if density else (None, None)
    for power in (0, 1, 2):
        values = exact(weight, power, mask)
        found = ops.path_backward(weight, g, power=power, mask=packed)
        within(found, g @ values.float(), g.double() @ values)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_path_backward_reads_half_weights_exactly(dtype: torch.dtype, batch: int) -> None:
    weight = torch.randn(37, 83).to(dtype)
    g = torch.rand(batch, 37)
    for power in (1, 2):
        values = exact(weight, power, None)
        found = ops.path_backward(weight, g, power=power)
        within(found, g @ values.float(), g.double() @ values)


def test_path_backward_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    packed = ops.pack_mask(torch.tensor([[True, False, True], [True, True, False]]))
    g = torch.tensor([1.0, 2.0])
    assert ops.path_backward(weight, g).tolist() == [1.0, 8.0, 2.5]
    assert ops.path_backward(weight, g, power=2).tolist() == [1.0, 22.0, 2.25]
    assert ops.path_backward(weight, g, power=0, mask=packed).tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_path_backward_never_reads_what_is_masked(batch: int, density: float) -> None:
    weight = torch.randn(50, 70)
    mask, packed = keep(weight, density)
    g = torch.rand(batch, 50)
    found = ops.path_backward(torch.where(mask, weight, torch.nan), g, mask=packed)
    assert torch.equal(found, ops.path_backward(weight, g, mask=packed))


@pytest.mark.parametrize("batch", [1, 4, 40])
@pytest.mark.parametrize("density", [None, 0.1])
def test_path_backward_is_the_adjoint(batch: int, density: float | None) -> None:
    weight, x, g = torch.randn(90, 70), torch.rand(batch, 70), torch.rand(batch, 90)
    packed = keep(weight, density)[1] if density else None
    forward = (ops.path_forward(weight, x, mask=packed).double() * g).sum()
    backward = (ops.path_backward(weight, g, mask=packed).double() * x).sum()
    torch.testing.assert_close(forward, backward, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows", "columns", "batch"), [(0, 5, 2), (5, 0, 2), (5, 7, 0)])
def test_path_backward_of_nothing(rows: int, columns: int, batch: int) -> None:
    found = ops.path_backward(torch.randn(rows, columns), torch.rand(batch, rows))
    assert torch.equal(found, torch.zeros(batch, columns))


@pytest.mark.parametrize("batch", [1, 4, 33])
@pytest.mark.parametrize("density", [0.1, 0.9])
def test_path_backward_has_the_same_bits_for_any_number_of_threads(
    batch: int, density: float
) -> None:
    weight, g = torch.randn(1600, 700), torch.rand(batch, 1600)
    _, packed = keep(weight, density)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(ops.path_backward(weight, g, mask=packed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_path_backward_gradcheck(power: int, masked: bool) -> None:
    weight = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    g = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    packed = keep(weight, 0.5)[1] if masked else None
    assert torch.autograd.gradcheck(
        lambda w, v: ops.path_backward(w, v, power=power, mask=packed), (weight, g)
    )


@pytest.mark.parametrize("power", [0, 1, 2])
def test_path_backward_opcheck(power: int) -> None:
    weight = torch.randn(5, 7, requires_grad=power > 0)
    g = torch.rand(6, 5, requires_grad=True)
    for packed in (None, keep(weight, 0.5)[1]):
        torch.library.opcheck(torch.ops.paikern.path_backward, (weight, g, power, packed))


def test_path_backward_names_what_is_wrong() -> None:
    weight = torch.randn(5, 7)
    with pytest.raises(ValueError, match=r"path_backward: g must be \[5\] or \[batch, 5\]"):
        ops.path_backward(weight, torch.rand(7))
    with pytest.raises(ValueError, match=r"weight must be \[out, in\]"):
        ops.path_backward(weight[0], torch.rand(7))
