"""Passes over maps by the CUDA sources, against the reference and the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from paikern import ops
from paikern.backends import cuda_maps
from python_tests.cuda_source.path_calls import DTYPES, both, on

pytestmark = pytest.mark.cuda_source
SIZES = (0, 1, 31, 33, 1000, 20_000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_maximum(size: int, dtype: torch.dtype) -> None:
    for wide in (torch.randn(size), -torch.rand(size), torch.zeros(size)):
        values = wide.to(dtype)
        found, wanted = both(lambda v=values: ops.map_maximum(v))
        assert found == wanted


@pytest.mark.parametrize("number", [math.inf, -math.inf, -0.0, 1e-45])
def test_maximum_of_special_numbers(number: float) -> None:
    found, wanted = both(lambda: ops.map_maximum(torch.tensor([number, -math.inf])))
    assert found == wanted


def test_maximum_is_nan_where_there_is_one() -> None:
    values = torch.full((5000,), math.inf)
    values[4321] = -math.nan
    assert math.isnan(on("cuda_source", lambda: ops.map_maximum(values)))


@pytest.mark.parametrize("by", [3, -5, -130, -160, 127, 128, 200])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_scale_is_exact(by: int, floor: float) -> None:
    values = torch.cat([torch.randn(700), torch.tensor([0.0, 1e-38, math.inf])])
    found, wanted = both(lambda: ops.map_scale(values.clone(), by, floor=floor), "cpu")
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_writes_in_place(dtype: torch.dtype) -> None:
    values = torch.rand(100).to(dtype)
    wanted = values * 8
    found = on("cuda_source", lambda: ops.map_scale(values, 3))
    assert found.data_ptr() == values.data_ptr()
    assert torch.equal(values, wanted)


@pytest.mark.parametrize(
    "shape",
    [(17,), (3, 9), (0, 4), (2, 5, 3, 3), (70, 9), (300, 3), (1, 9, 50), (2, 3, 40, 41)],
    ids=str,
)
def test_live_nodes(shape: tuple[int, ...]) -> None:
    """One thread, one warp and one block a unit."""
    dim = 1 if len(shape) > 2 else -1
    for density in (0.0, 0.001, 0.1):
        y = torch.relu(torch.randn(shape))
        g = torch.where(torch.rand(shape) < density, 1.0, 0.0)
        found, wanted = both(lambda a=y, b=g: ops.live_nodes(a, b, dim))
        assert torch.equal(found, wanted)


def test_live_nodes_of_maps_that_are_not_contiguous() -> None:
    y, g = torch.rand(5, 33).T, torch.rand(33, 10)[:, ::2] < 0.3
    found, wanted = both(lambda: ops.live_nodes(y, g.float(), -1))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [1, 33, 5000, 20_000])
def test_through_maximum_shares_among_ties(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = torch.rand(size), torch.rand(size)
    x /= x.max()
    x[: size // 3] = 1.0
    found, wanted = both(lambda: ops.through_maximum(g.clone(), x, 3.7))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr(cuda_maps, "_BLOCKS", 2)
    again = on("cuda_source", lambda: ops.through_maximum(g.clone(), x, 3.7))
    assert torch.equal(found, again)


def test_without_a_maximum_nothing_is_shared() -> None:
    found, wanted = both(lambda: ops.through_maximum(torch.ones(3), torch.full((3,), 0.5), 2.0))
    assert torch.equal(found, wanted)
