from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paikern import ops
from paikern.backends import registry
from paikern.backends.reference import factored_score
from paikern.errors import NonFiniteScoreError
from python_tests.ops.pattern_cases import LAYOUTS, laid_out, mean_of_blocks
from python_tests.ops.selection_cases import DTYPES, make_scores

# Shapes with the blocks of each: squares with and without edges, rows, columns, kernels, all of it.
CASES = [
    ((33, 70), (16, 16)),
    ((64, 64), (16, 8)),
    ((7, 13), (3, 5)),
    ((40, 3), (40, 1)),
    ((3, 5000), (1, 5000)),
    ((3, 9000), (2, 4500)),
    ((2, 9000), (1, 7)),
    ((12, 5, 3, 3), (12, 9)),
    ((12, 5, 3, 3), (1, 9)),
    ((12, 5, 3, 3), (1, 45)),
    ((5, 6, 7), (1, 1)),
    ((9, 4), (100, 100)),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "block"), CASES, ids=str)
def test_block_means_equal_the_promised_sums(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    """Bit for bit, not nearly: ties between blocks must be ties everywhere."""
    generator = np.random.default_rng(6)
    flat = make_scores(generator, math.prod(shape), "plain", dtype, "contiguous")
    for layout in LAYOUTS:
        scores = laid_out(flat.reshape(shape), layout)
        for absolute in (False, True):
            with registry.using(backend):
                found = ops.block_means(scores, block, absolute=absolute)
            assert found.dtype == torch.float64
            assert torch.equal(found, mean_of_blocks(scores, block, absolute)), layout


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_block_means_factored_equal_the_dense_score(
    backend: str, dtype: torch.dtype, power: int
) -> None:
    for strided in (False, True):
        weight = torch.randn(300, 170).to(dtype)
        weight = weight.T if strided else weight
        a, g = torch.rand(weight.shape[1]), torch.rand(weight.shape[0])
        candidates = ops.topk_mask(torch.rand(weight.shape), weight.numel() // 3)[0]
        for mask in (None, candidates):
            score = factored_score(weight, a, g, power)
            if mask is not None:
                score[~ops.unpack_mask(mask, score.shape)] = -1.0
            for block in ((16, 16), (1, weight.shape[1]), (weight.shape[0], 1)):
                with registry.using(backend):
                    found = ops.block_means_factored(weight, a, g, block, power=power, mask=mask)
                assert torch.equal(found, mean_of_blocks(score, block, False))


def test_block_means_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [5.0, 6.0, -7.0], [9.0, 0.0, 1.0]])
    assert ops.block_means(scores, (2, 2)).tolist() == [[3.5, -2.0], [4.5, 1.0]]
    assert ops.block_means(scores, (2, 2), absolute=True).tolist() == [[3.5, 5.0], [4.5, 1.0]]
    assert ops.block_means(scores, (1, 3)).tolist() == [[2.0], [4 / 3], [10 / 3]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_block_means_of_infinities_and_nan(backend: str) -> None:
    scores = torch.ones(4, 40)
    scores[0, 0] = math.inf
    with registry.using(backend):
        assert ops.block_means(scores, (2, 20)).tolist() == [[math.inf, 1.0], [1.0, 1.0]]
        scores[1, 3] = -math.inf
        with pytest.raises(NonFiniteScoreError, match=r"conv\.weight hold NaN"):
            ops.block_means(scores, (2, 20), name="conv.weight")
        scores[0, 0] = math.nan
        with pytest.raises(NonFiniteScoreError, match=r"scores\[0\] holds NaN"):
            ops.block_means(scores, (1, 1))


def test_block_means_of_nothing() -> None:
    for shape, wanted in (((0, 5), (0, 2)), ((5, 0), (2, 0))):
        assert ops.block_means(torch.rand(shape), (3, 3)).shape == wanted


def test_block_means_errors() -> None:
    with pytest.raises(ValueError, match="blocks need two or more dimensions"):
        ops.block_means(torch.rand(8), (2, 2))
    with pytest.raises(ValueError, match=r"block must be \[rows, columns\]"):
        ops.block_means(torch.rand(8, 8), (2, 0))
    with pytest.raises(TypeError, match="must be a float tensor"):
        ops.block_means(torch.ones(8, 8, dtype=torch.int32), (2, 2))
    with pytest.raises(ValueError, match=r"head needs weight \[out, in\]"):
        ops.block_means_factored(
            torch.rand(2, 3), torch.rand(2), torch.rand(2), (1, 1), name="head"
        )
