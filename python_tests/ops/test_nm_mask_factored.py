from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.backends.reference import factored_score
from paikern.errors import NonFiniteScoreError
from python_tests.ops.pattern_cases import best_of_groups, unpacked

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(
    rows: int, columns: int, dtype: torch.dtype, strided: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(columns, rows).T if strided else torch.randn(rows, columns)
    return weight.to(dtype), torch.rand(columns).round(decimals=1), torch.rand(rows)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "columns"])
def test_nm_mask_factored_equals_the_dense_score(
    backend: str, dtype: torch.dtype, power: int, strided: bool
) -> None:
    layers = [layer(*shape, dtype, strided) for shape in ((5, 16), (33, 130), (64, 1500), (3, 2))]
    for _, _, g in layers:
        g[::3] = 0  # every score of the row ties
    weights, a, g = (list(part) for part in zip(*layers, strict=True))
    candidates = [ops.topk_mask(torch.rand(w.shape), w.numel() // 2)[0] for w in weights]
    masks = [candidates[0], None, candidates[2], candidates[3]]
    for n, m in ((2, 4), (3, 7), (5, 20)):
        for dim in (0, 1):
            with registry.using(backend):
                packed = ops.nm_mask_factored(
                    weights, a, g, n, m, power=power, dims=dim, masks=masks
                )
            for found, w, x, y, bits in zip(
                unpacked(packed, weights), weights, a, g, masks, strict=True
            ):
                score = factored_score(w, x, y, power)
                if bits is not None:
                    score[~ops.unpack_mask(bits, score.shape)] = -1.0
                assert torch.equal(found, best_of_groups(score, n, m, dim, False)), (n, m, dim)


def test_nm_mask_factored_by_hand() -> None:
    w = torch.tensor([[1.0, -3.0, 2.0, 1.0], [9.0, 1.0, 1.0, 9.0]])
    packed = ops.nm_mask_factored([w], [torch.tensor([1.0, 1.0, 2.0, 0.0])], [torch.ones(2)], 2, 4)
    assert packed[0].tolist() == [0b01010110]  # scores 1 3 4 0 and 9 1 2 0
    packed = ops.nm_mask_factored([w], [torch.ones(4)], [torch.tensor([1.0, 0.0])], 2, 4)
    assert packed[0].tolist() == [0b00110110]  # nothing leads on: all 0, the first are kept


def test_nm_mask_factored_where_the_product_leaves_float32() -> None:
    w, a = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.full((4,), 1e30)
    (bits,) = ops.nm_mask_factored([w], [a], [torch.tensor([1e30])], 2, 4)
    assert bits.tolist() == [0b0011]  # all infinite: a tie, as for dense scores
    (bits,) = ops.nm_mask_factored([w], [a], [torch.tensor([1.0])], 2, 4)
    assert bits.tolist() == [0b1100]


def test_nm_mask_factored_nan_counts_among_candidates_only() -> None:
    w, g = torch.ones(1, 4), torch.zeros(1)
    a = torch.tensor([1.0, math.inf, 1.0, 1.0])  # inf * 0
    with pytest.raises(NonFiniteScoreError, match=r"fc\.weight hold NaN"):
        ops.nm_mask_factored([w], [a], [g], 2, 4, names=["fc.weight"])
    allowed = ops.pack_mask(torch.tensor([True, False, True, True]))
    (bits,) = ops.nm_mask_factored([w], [a], [g], 2, 4, masks=[allowed])
    assert bits.tolist() == [0b0101]


def test_nm_mask_factored_errors() -> None:
    w, a, g = torch.rand(3, 8), torch.rand(8), torch.rand(3)
    assert ops.nm_mask_factored([], [], [], 2, 4) == []
    for call, message in (
        (lambda: ops.nm_mask_factored([w], [g], [a], 2, 4), r"layer 0 needs weight \[out, in\]"),
        (lambda: ops.nm_mask_factored([w], [a], [g], 2, 4, power=3), "power must be 1 or 2, got 3"),
        (lambda: ops.nm_mask_factored([w], [a], [], 2, 4), "1 weights, 1 a, 0 g and 1 masks"),
        (lambda: ops.nm_mask_factored([w], [a], [g], 4, 2), "needs 1 <= n <= m, got 4:2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
