"""N:M masks, means of blocks and their expansion by the CUDA sources: the CPU suite's problems."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.pattern_cases import (
    LAYOUTS,
    SHAPES,
    Groups,
    best_of_groups,
    group_problems,
    laid_out,
    mean_of_blocks,
    unpacked,
)

pytestmark = pytest.mark.cuda_source
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(group_problems())
def test_nm_mask(problem: Groups) -> None:
    arguments = (problem.scores, problem.n, problem.m)
    options = {"dims": problem.dims, "absolute": problem.absolute}
    with registry.using("cuda_source"):
        packed = ops.nm_mask(*arguments, **options)
    assert all(map(torch.equal, packed, ops.nm_mask(*arguments, **options)))
    for found, scores, dim in zip(
        unpacked(packed, problem.scores), problem.scores, problem.dims, strict=True
    ):
        wanted = best_of_groups(scores, problem.n, problem.m, dim, problem.absolute)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_nm_mask_factored(dtype: torch.dtype, power: int, dim: int) -> None:
    shapes = ((5, 16), (33, 130), (64, 500), (3, 2), (9, 1), (1, 9))
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    weights[2] = weights[2].T.contiguous().T
    a = [torch.rand(shape[1]).round(decimals=1) for shape in shapes]
    g = [torch.rand(shape[0]) for shape in shapes]
    for rows in g:
        rows[::3] = 0  # every score of the row ties
    masks = [ops.pack_mask(torch.rand(shape) < 0.5) for shape in shapes]
    masks[1] = None
    for n, m in ((2, 4), (3, 7), (5, 20)):
        arguments = (weights, a, g, n, m)
        options = {"power": power, "dims": dim, "masks": masks}
        wanted = ops.nm_mask_factored(*arguments, **options)
        with registry.using("cuda_source"):
            assert all(map(torch.equal, ops.nm_mask_factored(*arguments, **options), wanted))


@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_means_have_the_promised_bits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout, absolute in zip(LAYOUTS, (False, True, False, True, False), strict=True):
        scores = laid_out((torch.randn(shape) * 10).to(dtype), layout)
        for block in ((1, 1), (2, 4), (3, 8), (7, 5), (16, 33), (100, 1000)):
            with registry.using("cuda_source"):
                found = ops.block_means(scores, block, absolute=absolute)
            assert torch.equal(found, ops.block_means(scores, block, absolute=absolute))
            size = [min(b, n) for b, n in zip(block, (shape[0], math.prod(shape[1:])), strict=True)]
            assert torch.equal(found, mean_of_blocks(scores, size, absolute))


@pytest.mark.parametrize("power", [1, 2])
def test_block_means_factored(power: int) -> None:
    weight, a, g = torch.randn(37, 53).half(), torch.rand(53), torch.rand(37)
    for mask in (None, ops.pack_mask(torch.rand(37, 53) < 0.5)):
        for block in ((1, 8), (4, 4), (16, 20), (64, 64)):
            options = {"power": power, "mask": mask}
            wanted = ops.block_means_factored(weight, a, g, block, **options)
            with registry.using("cuda_source"):
                found = ops.block_means_factored(weight, a, g, block, **options)
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [*SHAPES, (31, 33), (1, 1)], ids=str)
def test_expand_blocks(shape: tuple[int, ...]) -> None:
    columns = math.prod(shape[1:])
    for block in ((1, 1), (2, 4), (3, 5), (64, 64)):
        size = [min(b, max(n, 1)) for b, n in zip(block, (shape[0], columns), strict=True)]
        count = -(-shape[0] // size[0]) * -(-columns // size[1])
        packed = ops.pack_mask(torch.rand(count) < 0.5)
        wanted = ops.expand_blocks(packed, shape, block)
        with registry.using("cuda_source"):
            assert torch.equal(ops.expand_blocks(packed, shape, block), wanted)


def test_nan_is_refused() -> None:
    scores = [torch.randn(4, 8), torch.randn(4, 8)]
    scores[1][2, 3] = torch.nan
    with registry.using("cuda_source"):
        with pytest.raises(NonFiniteScoreError, match="scores of b hold NaN"):
            ops.nm_mask(scores, 2, 4, names=["a", "b"])
        with pytest.raises(NonFiniteScoreError, match=r"block_means: scores\[0\] holds NaN"):
            ops.block_means(scores[1], (2, 2))
        opposite = torch.tensor([[torch.inf, -torch.inf]])
        with pytest.raises(NonFiniteScoreError):
            ops.block_means(opposite, (1, 2))
