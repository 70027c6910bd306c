"""Passes over maps in Triton's interpreter, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from paikern import ops
from python_tests.triton.helpers import SIZES, both, on

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("size", [*SIZES, 5000])
def test_maximum(size: int) -> None:
    values = torch.randn(size)
    found, wanted = both(lambda: ops.map_maximum(values), "reference")
    assert found == wanted


def test_maximum_is_nan_where_there_is_one() -> None:
    values = torch.zeros(5000)
    values[4321] = math.nan
    assert math.isnan(on("triton", lambda: ops.map_maximum(values)))


@pytest.mark.parametrize("by", [3, -5, -130, -160, 127, 128, 200])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_scale_is_exact(by: int, floor: float) -> None:
    values = torch.cat([torch.randn(700), torch.tensor([0.0, 1e-38, math.inf])])
    found, wanted = both(lambda: ops.map_scale(values.clone(), by, floor=floor))
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("shape", [(17,), (3, 9), (0, 4), (2, 5, 3, 3), (70, 9)], ids=str)
def test_live_nodes(shape: tuple[int, ...]) -> None:
    y = torch.relu(torch.randn(shape))
    g = torch.where(torch.rand(shape) < 0.1, 1.0, 0.0)
    dim = 1 if len(shape) == 4 else -1
    found, wanted = both(lambda: ops.live_nodes(y, g, dim))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [1, 33, 5000])
def test_through_maximum_shares_among_ties(size: int) -> None:
    x, g = torch.rand(size), torch.rand(size)
    x /= x.max()
    x[: size // 3] = 1.0
    found, wanted = both(lambda: ops.through_maximum(g.clone(), x, 3.7), "reference")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
