"""Path operations of vectors and batches in Triton's interpreter, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from paikern import ops
from paikern.errors import NonFiniteScoreError
from python_tests.ops.path_cases import TOLERANCE, error, keep
from python_tests.triton.helpers import DTYPES, both, on

pytestmark = pytest.mark.triton

SHAPES = ((0, 3), (3, 0), (1, 1), (33, 31), (1, 1000), (300, 33), (17, 128))
POWERS = ((0, True), (1, False), (1, True), (2, True))


def _close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert error(found, wanted.double()) <= TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectors_both_ways(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = keep(weight, 0.4)[1]
    x, g = torch.rand(shape[1]), torch.rand(shape[0])
    for power, masked in POWERS:
        mask = packed if masked else None
        _close(*both(lambda p=power, m=mask: ops.path_forward(weight, x, power=p, mask=m)))
        _close(*both(lambda p=power, m=mask: ops.path_backward(weight, g, power=p, mask=m)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sweep_has_the_adjoint_and_the_bits_of_the_cpu(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = keep(weight, 0.4)[1]
    a, g = torch.rand(shape[1]), torch.rand(shape[0])
    for power, masked in POWERS:
        mask = packed if masked else None
        bound = 0.3 if power else 1e-40
        found, wanted = both(
            lambda p=power, m=mask, t=bound: ops.path_sweep(weight, a, g, t, power=p, mask=m)
        )
        _close(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert int(found[2]) == int(wanted[2])
        adjoint = on(
            "triton", lambda p=power, m=mask: ops.path_backward(weight, g, power=p, mask=m)
        )
        assert torch.equal(found[0], adjoint)


def test_sums_are_the_same_bits_from_run_to_run() -> None:
    weight, x, g = torch.randn(300, 200), torch.rand(200), torch.rand(300)
    for call in (lambda: ops.path_forward(weight, x), lambda: ops.path_backward(weight, g)):
        assert torch.equal(on("triton", call), on("triton", call))


@pytest.mark.parametrize("threshold", [0.1, -math.inf, math.inf, 1e300, -1e300, 0.0, 3.0])
def test_thresholds_are_compared_exactly(threshold: float) -> None:
    weight = torch.tensor([[1.0, 0.0, math.inf], [3.0, 0.1, 2.0]])
    mask = ops.pack_mask(torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0)
    ones = torch.ones(3), torch.ones(2)
    found, wanted = both(lambda: ops.path_sweep(weight, *ones, threshold, mask=mask))
    assert torch.equal(found[1], wanted[1])
    assert int(found[2]) == int(wanted[2])


def test_sweep_refuses_nan_but_not_under_the_mask() -> None:
    weight = torch.tensor([[math.nan, 1.0]])
    a, g = torch.ones(2), torch.ones(1)
    kept = ops.pack_mask(torch.tensor([[False, True]]))
    x, bits, _ = on("triton", lambda: ops.path_sweep(weight, a, g, 0.5, mask=kept))
    assert x.tolist() == [0.0, 1.0]
    assert bits.tolist() == [2]
    with pytest.raises(NonFiniteScoreError, match="the scores of fc hold NaN"):
        on("triton", lambda: ops.path_sweep(weight, a, g, 0.5, name="fc"))


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_both_ways_and_their_scores(batch: int, dtype: torch.dtype) -> None:
    weight = torch.randn(31, 33).T.to(dtype)  # not contiguous
    packed = keep(weight, 0.4)[1]
    x, g = torch.rand(batch, 31), torch.rand(batch, 33)
    for power, masked in POWERS:
        mask = packed if masked else None
        _close(*both(lambda p=power, m=mask: ops.path_forward(weight, x, power=p, mask=m)))
        _close(*both(lambda p=power, m=mask: ops.path_backward(weight, g, power=p, mask=m)))
        _close(
            *both(
                lambda p=power, m=mask: ops.path_score(weight, x, g, power=p, mask=m, pruned=-1.0)
            )
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_of_vectors(shape: tuple[int, int]) -> None:
    weight, x, g = torch.randn(shape), torch.rand(shape[1]), torch.rand(shape[0])
    _close(*both(lambda: ops.path_score(weight, x, g), "reference"))


def test_derivatives_go_through_the_backend() -> None:
    weight = torch.randn(5, 7, requires_grad=True)
    x = torch.rand(2, 7, requires_grad=True)

    def slopes() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ops.path_forward(weight, x, power=2).sum(), (weight, x))

    for found, wanted in zip(*both(slopes), strict=True):
        _close(found, wanted)
