"""Balanced masks by the CUDA sources: the bits of the CPU's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from paikern.ops.balanced_mask import KernelGrid
from python_tests.cuda_source import shim
from python_tests.ops.balanced_cases import LAYOUTS, check, random_rows

pytestmark = pytest.mark.cuda_source


def same(rows: Tensor, shape: tuple[int, ...], **options: Any) -> Tensor:
    """The mask, after it was seen to be that of the CPU."""
    with registry.using("cuda_source"):
        found = ops.balanced_mask(rows, shape, **options)
    assert torch.equal(found, ops.balanced_mask(rows, shape, **options))
    return found


@pytest.mark.parametrize(("shape", "groups", "transposed"), LAYOUTS, ids=str)
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_every_layout(
    shape: tuple[int, ...], groups: int, transposed: bool, fraction: float
) -> None:
    grid = KernelGrid.of(shape, groups=groups, transposed=transposed)
    for seed in range(3):
        rows = random_rows(grid, seed, fraction)
        bits = same(rows, shape, groups=groups, transposed=transposed, seed=seed, stream=3)
        check(bits, rows, grid, transposed)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    positions=st.integers(1, 9),
    groups=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**31 - 1),
    cover=st.none() | st.integers(0, 12),
    data=st.data(),
)
def test_any_rows(
    inputs: int,
    outputs: int,
    positions: int,
    groups: int,
    transposed: bool,
    seed: int,
    stream: int,
    cover: int | None,
    data: st.DataObject,
) -> None:
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    count = groups * inputs
    rows = torch.tensor(
        data.draw(st.lists(st.integers(0, outputs * positions), min_size=count, max_size=count))
    )
    options = {"groups": groups, "transposed": transposed, "cover": cover}
    same(rows, (groups * first, second, positions), seed=seed, stream=stream, **options)


@pytest.mark.parametrize("cover", [None, 0, 150, 290])
def test_rows_that_are_longer_than_a_block_of_threads(cover: int | None) -> None:
    """More entries to exchange than threads, and more favourites."""
    shape = (1500, 300)
    rows = torch.randint(900, 1500, (300,), generator=torch.Generator().manual_seed(1))
    rows[::7] = 1499
    check(same(rows, shape, cover=cover), rows, KernelGrid.of(shape), False, cover)


def test_results_do_not_depend_on_the_order_of_warps(on_cpu: shim.OnCpu) -> None:
    rows = torch.randint(0, 700 * 2, (40,), generator=torch.Generator().manual_seed(2))
    try:
        for way in (1, 2):
            on_cpu.order(way)
            for cover in (None, 20, 28):
                same(rows, (700, 40, 2), cover=cover, seed=way)
    finally:
        on_cpu.order(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_scores_of_every_type(dtype: torch.dtype, transposed: bool) -> None:
    shape = (6, 4, 3, 3)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(shape, generator=generator).mul(3).round().to(dtype)  # ties
    scores[0, 0, 0, 0], scores[1, 2, 2, 1] = math.inf, -math.inf
    scores[3, 3] *= 2.0**-20
    rows = random_rows(KernelGrid.of(shape, transposed=transposed), 2)
    same(rows, shape, transposed=transposed, seed=5, scores=scores.transpose(2, 3))
    flat = scores.flatten(1)
    rows = random_rows(KernelGrid.of(flat.shape), 3)
    same(rows, tuple(flat.shape), scores=flat)


def test_nothing_and_nan() -> None:
    with registry.using("cuda_source"):
        none = torch.empty(0, dtype=torch.int64)
        assert ops.balanced_mask(none, (4, 0)).numel() == 0
        assert ops.balanced_mask(torch.zeros(3, dtype=torch.int64), (0, 3)).numel() == 0
        scores = torch.rand(3, 2)
        scores[1, 1] = math.nan
        with pytest.raises(NonFiniteScoreError, match=r"fc\.weight.*NaN"):
            ops.balanced_mask(torch.tensor([1, 2]), (3, 2), scores=scores, name="fc.weight")
