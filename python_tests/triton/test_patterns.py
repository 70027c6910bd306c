"""Structured masks in Triton's interpreter: equal to the CPU's, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from paikern import ops
from paikern.errors import NonFiniteScoreError
from python_tests.triton.helpers import DTYPES, both, on

pytestmark = pytest.mark.triton

BLOCKS = ((1, 1), (4, 16), (3, 5), (100, 100))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (1, 100)])
def test_nm_masks_equal_the_cpu(dtype: torch.dtype, n: int, m: int) -> None:
    for shape, dim in (((33, 31), 1), ((7, 10), 0), ((4, 6, 3, 3), 1), ((0, 4), 1)):
        scores = torch.randn(shape).mul(3).round().to(dtype)  # ties
        for absolute in (False, True):
            found, wanted = both(
                lambda s=scores, d=dim, a=absolute: ops.nm_mask(
                    [s, s[:2]], n, m, dims=d, absolute=a
                )
            )
            assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_factored_patterns_equal_the_cpu(dtype: torch.dtype, masked: bool) -> None:
    weight = torch.randn(29, 13).to(dtype).T
    a, g = torch.rand(29), torch.rand(13).round()
    mask = ops.pack_mask(torch.rand(13, 29) < 0.5) if masked else None
    for power in (1, 2):
        for dim in (0, 1):
            found, wanted = both(
                lambda p=power, d=dim: ops.nm_mask_factored(
                    [weight], [a], [g], 2, 4, power=p, dims=d, masks=[mask]
                )
            )
            assert torch.equal(found[0], wanted[0])
        means = both(
            lambda p=power: ops.block_means_factored(weight, a, g, (3, 5), power=p, mask=mask)
        )
        assert torch.equal(*means)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_means_are_the_same_bits(dtype: torch.dtype, block: tuple[int, int]) -> None:
    scores = torch.randn(13, 29).to(dtype)
    for values, absolute in ((scores, True), (scores.T, False)):
        found, wanted = both(lambda v=values, a=absolute: ops.block_means(v, block, absolute=a))
        assert torch.equal(found, wanted)
        packed = ops.pack_mask(torch.rand(wanted.shape) < 0.5)
        assert torch.equal(*both(lambda p=packed, v=values: ops.expand_blocks(p, v.shape, block)))


NAN = {
    "nm_mask": lambda: ops.nm_mask([torch.ones(2, 4), torch.full((1, 2), math.nan)], 1, 2),
    "nm_mask_factored": lambda: ops.nm_mask_factored(
        [torch.ones(1, 2)], [torch.tensor([0.0, math.inf])], [torch.zeros(1)], 1, 2
    ),
    "block_means": lambda: ops.block_means(torch.tensor([[math.inf, -math.inf]]), (1, 2)),
    "block_means_factored": lambda: ops.block_means_factored(
        torch.ones(1, 2), torch.tensor([0.0, math.inf]), torch.zeros(1), (1, 1)
    ),
}


@pytest.mark.parametrize("operation", NAN)
def test_nan_is_refused_with_the_same_words(operation: str) -> None:
    said = []
    for backend in ("cpu", "triton"):
        with pytest.raises(NonFiniteScoreError) as raised:
            on(backend, NAN[operation])
        said.append(str(raised.value))
    assert said[0] == said[1]
