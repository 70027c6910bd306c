"""Exact selection in Triton's interpreter: masks equal to the CPU's, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paikern import ops
from paikern.errors import NonFiniteScoreError
from python_tests.ops.selection_cases import ALL_KINDS, equal, make_scores
from python_tests.triton.helpers import DTYPES, SIZES, both, on

pytestmark = pytest.mark.triton


def _list(kind: str, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    layouts = ("contiguous", "strided", "transposed", "offset", "expanded")
    sizes = (0, 1, 33, 1000, 800, 31)
    return [
        make_scores(generator, size, kind, dtype, layouts[i % len(layouts)])
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_masks_equal_the_cpu(kind: str, dtype: torch.dtype) -> None:
    scores = _list(kind, dtype, 1)
    total = sum(s.numel() for s in scores)
    for k in (total // 3, [s.numel() // 2 for s in scores]):
        found, wanted = both(lambda k=k: ops.topk_mask(scores, k, absolute=True))
        assert equal(found, wanted)


@pytest.mark.parametrize("k", [0, 1, 776, 1552, 1553])
def test_every_k_is_kept_exactly(k: int) -> None:
    scores = [torch.randint(-3, 4, (size,)).float() for size in (1000, 31, 522)]
    found, wanted = both(lambda: ops.topk_mask(scores, k))
    assert equal(found, wanted)
    kept = [ops.unpack_mask(bits, s.shape) for bits, s in zip(found, scores, strict=True)]
    assert sum(int(mask.sum()) for mask in kept) == k


@pytest.mark.parametrize("reach", [1, 30, 400_000])
@pytest.mark.parametrize("kind", ["special", "subnormal", "wide"])
def test_exponents_rank_exactly(kind: str, reach: int) -> None:
    scores = _list(kind, torch.float32, 2)
    exponents = [0, -reach, reach, 0, reach // 2, -reach]
    found, wanted = both(lambda: ops.topk_mask(scores, 700, exponents=exponents))
    assert equal(found, wanted)


@pytest.mark.parametrize("size", SIZES)
def test_candidates_and_mixed_types(size: int) -> None:
    scores = [torch.randn(size).to(dtype) for dtype in DTYPES]
    if size:
        scores[0][0] = math.nan  # excluded
    masks = [ops.pack_mask((torch.rand(size) < 0.5) & (torch.arange(size) > 0)), None, None]
    for absolute in (False, True):
        found, wanted = both(
            lambda absolute=absolute: ops.topk_mask(scores, size, absolute=absolute, masks=masks)
        )
        assert equal(found, wanted)


def test_float64_scores_are_ranked_by_the_reference() -> None:
    scores = [torch.randn(50, dtype=torch.float64), torch.randn(50)]
    found, wanted = both(lambda: ops.topk_mask(scores, 20))
    assert equal(found, wanted)


def test_memory_does_not_change_the_mask() -> None:
    scores, memory = torch.randn(333), torch.full((1, 2), math.nan, dtype=torch.float64)
    wanted = ops.topk_mask(scores, 100)
    assert equal(on("triton", lambda: ops.topk_mask(scores, 100, memory=memory)), wanted)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factored_scores_equal_the_cpu(dtype: torch.dtype, power: int) -> None:
    shapes = ((33, 31), (1, 65), (7, 8), (0, 4), (40, 3))
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    weights[2] = torch.randn(8, 7).to(dtype).T
    a = [torch.rand(w.shape[1]) for w in weights]
    g = [torch.rand(w.shape[0]).round(decimals=1) for w in weights]
    masks = [ops.pack_mask(torch.rand(w.shape) < 0.7) for w in weights]
    for exponents in ([0] * 5, [0, 3, -40, 1, 7]):
        for k in (200, [20, 30, 40, 0, 60]):
            found, wanted = both(
                lambda e=exponents, k=k: ops.topk_mask_factored(
                    weights, a, g, e, k, power=power, masks=masks
                )
            )
            assert equal(found, wanted)


def test_scores_of_maps_are_those_of_the_path_scores() -> None:
    w, conv = torch.randn(9, 12), torch.randn(5, 2, 3, 3)
    x, g = torch.rand(3, 12), torch.rand(3, 9)
    cx, cg = torch.rand(2, 2, 6, 5), torch.rand(2, 5, 6, 5)
    geometry = ([1, 1], [1, 1], [1, 1], 1)

    def selected() -> list[torch.Tensor]:
        return ops.topk_mask_factored(
            [w, conv], [x, cx], [g, cg], [0, 2], 77, convs=[None, geometry]
        )

    def ranked() -> list[torch.Tensor]:
        scores = [ops.path_score(w, x, g), ops.path_conv_score(conv, cx, cg, *geometry)]
        return ops.topk_mask(scores, 77, exponents=[0, 2])

    assert equal(on("triton", selected), on("triton", ranked))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_the_cpu(dtype: torch.dtype) -> None:
    weights = [torch.randn(size).to(dtype) for size in (0, 31, 1000)]
    gradients = [torch.randn(size) for size in (0, 31, 1000)]
    masks = [None, None, ops.pack_mask(torch.rand(1000) < 0.5)]
    for k in (300, [0, 31, 7]):
        found, wanted = both(lambda k=k: ops.topk_mask_product(weights, gradients, k, masks=masks))
        assert equal(found, wanted)


@pytest.mark.parametrize("kind", ["plain", "ties", "special", "subnormal"])
def test_kth_largest_equals_the_cpu(kind: str) -> None:
    scores = [s for dtype in DTYPES for s in _list(kind, dtype, 3)]
    total = sum(s.numel() for s in scores)
    for k in (1, 500, total):
        found, wanted = both(lambda k=k: ops.kth_largest(scores, k))
        assert found == wanted


def _with_nan() -> list[torch.Tensor]:
    return [torch.ones(3), torch.tensor([1.0] * 700 + [math.nan]), torch.tensor([math.nan])]


NAN = {
    "topk_mask": lambda: ops.topk_mask(_with_nan(), 5),
    "kth_largest": lambda: ops.kth_largest(_with_nan(), 5),
    "topk_mask_product": lambda: ops.topk_mask_product(_with_nan(), _with_nan(), 5),
    "topk_mask_factored": lambda: ops.topk_mask_factored(
        [torch.ones(2, 2), torch.ones(2, 2)],
        [torch.ones(2), torch.tensor([0.0, math.inf])],
        [torch.ones(2), torch.tensor([0.0, 1.0])],
        [0, 1],
        2,
    ),
}


@pytest.mark.parametrize("operation", NAN)
def test_nan_is_refused_with_the_same_words(operation: str) -> None:
    with pytest.raises(NonFiniteScoreError) as wanted:
        on("cpu", NAN[operation])
    with pytest.raises(NonFiniteScoreError) as found:
        on("triton", NAN[operation])
    assert str(found.value) == str(wanted.value)
    assert "scores[1] holds NaN" in str(found.value)
