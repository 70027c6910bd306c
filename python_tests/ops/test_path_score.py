from __future__ import annotations

import pytest
import torch

from paikern import ops
from python_tests.ops.path_cases import DTYPES, exact, ids, keep, within


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (1, 1000), (1000, 1), (70, 300)], ids=ids)
@pytest.mark.parametrize("batch", [None, 1, 2, 5, 300], ids=ids)
@pytest.mark.parametrize("density", [None, 0.1])
def test_path_score_equals_the_definition(
    dtype: torch.dtype, shape: tuple[int, int], batch: int | None, density: float | None
) -> None:
    weight = torch.randn(shape).to(dtype)
    mask, packed = keep(weight, density) if density else (None, None)
    x = torch.rand(*(() if batch is None else (batch,)), shape[1])
    g = torch.rand(*(() if batch is None else (batch,)), shape[0])
    rows, columns = g.reshape(-1, shape[0]), x.reshape(-1, shape[1])
    for power in (0, 1, 2):
        values = exact(weight, power, mask)
        truth = values * (rows.double().T @ columns.double())
        found = ops.path_score(weight, x, g, power=power, mask=packed)
        within(found, values.float() * (rows.T @ columns), truth)
        if mask is not None:
            marked = ops.path_score(weight, x, g, power=power, mask=packed, pruned=-1.0)
            assert torch.equal(marked, torch.where(mask, found, -1.0))


def test_path_score_by_hand() -> None:
    # section 10 of the path family: S_1 of SynFlow, paths out (3, 5)
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    score = ops.path_score(weight, torch.ones(3), torch.tensor([3.0, 5.0]))
    assert score.tolist() == [[3.0, 6.0, 1.5], [0.0, 15.0, 5.0]]


def test_path_score_marks_masked_nan() -> None:
    weight = torch.tensor([[torch.nan, 2.0]])
    packed = ops.pack_mask(torch.tensor([[False, True]]))
    score = ops.path_score(weight, torch.ones(2), torch.ones(1), mask=packed, pruned=-1.0)
    assert score.tolist() == [[-1.0, 2.0]]


def test_path_score_of_no_batch() -> None:
    weight = torch.randn(3, 4)
    mask, packed = keep(weight, 0.5)
    found = ops.path_score(weight, torch.rand(0, 4), torch.rand(0, 3), mask=packed, pruned=-1.0)
    assert torch.equal(found, torch.where(mask, 0.0, -1.0))
    assert ops.path_score(weight[:0], torch.rand(2, 4), torch.rand(2, 0)).shape == (0, 4)


def test_path_score_sums_to_the_paths() -> None:
    # conservation: a layer's scores add up to the paths through it
    weight, x, g = torch.randn(40, 60), torch.rand(7, 60), torch.rand(7, 40)
    total = (ops.path_forward(weight, x).double() * g).sum()
    torch.testing.assert_close(
        ops.path_score(weight, x, g).double().sum(), total, rtol=1e-6, atol=0
    )


def test_path_score_has_the_same_bits_for_any_number_of_threads() -> None:
    weight, x, g = torch.randn(700, 1600), torch.rand(33, 1600), torch.rand(33, 700)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(ops.path_score(weight, x, g))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


def test_path_score_opcheck() -> None:
    weight, x, g = torch.randn(5, 7), torch.rand(6, 7), torch.rand(6, 5)
    for packed in (None, keep(weight, 0.5)[1]):
        torch.library.opcheck(torch.ops.paikern.path_score, (weight, x, g, 1, packed, -1.0))


def test_path_score_names_what_is_wrong() -> None:
    weight = torch.randn(5, 7)
    with pytest.raises(ValueError, match="path_score: g must be"):
        ops.path_score(weight, torch.rand(7), torch.rand(7))
    with pytest.raises(ValueError, match="must have the same batch"):
        ops.path_score(weight, torch.rand(2, 7), torch.rand(3, 5))
