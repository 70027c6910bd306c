"""Balanced masks in Triton's interpreter: equal to the CPU's, bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.errors import NonFiniteScoreError
from paikern.ops.balanced_mask import KernelGrid
from python_tests.ops.balanced_cases import LAYOUTS, check, random_rows
from python_tests.triton.helpers import both, on

pytestmark = pytest.mark.triton


def same(rows: Tensor, shape: tuple[int, ...], **options: Any) -> Tensor:
    """The mask, after it was seen to be that of the CPU."""
    found, wanted = both(lambda: ops.balanced_mask(rows, shape, **options))
    assert torch.equal(found, wanted)
    return found


@pytest.mark.parametrize(("shape", "groups", "transposed"), LAYOUTS, ids=str)
def test_every_layout(shape: tuple[int, ...], groups: int, transposed: bool) -> None:
    grid = KernelGrid.of(shape, groups=groups, transposed=transposed)
    for seed, fraction in enumerate((0.1, 0.6, 1.0)):
        rows = random_rows(grid, seed, fraction)
        bits = same(rows, shape, groups=groups, transposed=transposed, seed=seed, stream=3)
        check(bits, rows, grid, transposed)


@pytest.mark.parametrize("seed", range(12))
def test_any_rows(seed: int) -> None:
    """Small layers of every kind, where rows often go over the end of a lap."""
    draw = torch.Generator().manual_seed(seed)
    inputs, outputs, positions, groups = torch.randint(1, 7, (4,), generator=draw).tolist()
    rows = torch.randint(0, outputs * positions + 1, (groups * inputs,), generator=draw)
    transposed = seed % 2 == 0
    first, second = (inputs, outputs) if transposed else (outputs, inputs)
    for cover in (None, 0, inputs // 2):
        same(
            rows, (groups * first, second, positions), groups=groups, transposed=transposed,
            cover=cover, seed=2**64 - 1 - seed, stream=2**31 - 1 - seed,
        )  # fmt: skip


@pytest.mark.parametrize("cover", [None, 0, 3, 6])
def test_rows_that_are_longer_than_a_tile(cover: int | None) -> None:
    shape = (100, 8)
    rows = torch.randint(70, 100, (8,), generator=torch.Generator().manual_seed(1))
    rows[::5] = 99
    check(same(rows, shape, cover=cover), rows, KernelGrid.of(shape), False, cover)


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
    same(random_rows(KernelGrid.of(flat.shape), 3), tuple(flat.shape), scores=flat)


def test_nothing_and_nan() -> None:
    none = torch.empty(0, dtype=torch.int64)
    for rows, shape in ((none, (4, 0)), (torch.zeros(3, dtype=torch.int64), (0, 3))):
        assert same(rows, shape).numel() == 0
    scores, rows = torch.rand(3, 2), torch.tensor([1, 2])
    scores[1, 1] = math.nan
    with pytest.raises(NonFiniteScoreError, match=r"fc\.weight.*NaN"):
        on("triton", lambda: ops.balanced_mask(rows, (3, 2), scores=scores, name="fc.weight"))
