from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.selection_cases import DTYPES, KINDS, Problem, make_scores, problems


def kth(scores: list[Tensor], k: int) -> float:
    flat = torch.cat([s.double().reshape(-1) for s in scores])
    return float(flat.sort(descending=True).values[k - 1])


@settings(max_examples=500, deadline=None, derandomize=True)
@given(problems(), st.data())
def test_kth_largest_equals_sort(problem: Problem, data: st.DataObject) -> None:
    total = sum(s.numel() for s in problem.scores)
    if total == 0:
        return
    k = data.draw(st.integers(1, total))
    for backend in ("cpu", "reference"):
        with registry.using(backend):
            assert ops.kth_largest(problem.scores, k) == kth(problem.scores, k)


@pytest.mark.parametrize("size", [4096, 4097, 70_000, 300_000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kth_largest_of_large_tensors(size: int, kind: str, dtype: torch.dtype) -> None:
    scores = make_scores(np.random.default_rng(size), size, kind, dtype, "contiguous")
    for k in (1, size // 3, size):
        assert ops.kth_largest(scores, k) == kth([scores], k)


def test_kth_largest_by_hand() -> None:
    scores = [torch.tensor([3.0, -math.inf]), torch.tensor([[math.inf], [3.0]])]
    assert [ops.kth_largest(scores, k) for k in (1, 2, 3, 4)] == [math.inf, 3, 3, -math.inf]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kth_largest_of_negative_zeros_is_positive(backend: str) -> None:
    with registry.using(backend):
        assert math.copysign(1, ops.kth_largest(torch.tensor([-0.0, -0.0]), 1)) == 1


@pytest.mark.parametrize("size", [3, 140_000])
def test_kth_largest_refuses_nan(size: int) -> None:
    scores = torch.rand(size)
    scores[-1] = math.nan
    with pytest.raises(NonFiniteScoreError, match=r"scores\[1\] holds NaN"):
        ops.kth_largest([torch.ones(2), scores], 2)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_kth_largest_errors(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, 4\], got {k}"):
        ops.kth_largest(torch.rand(4), k)
    with pytest.raises(ValueError, match="kth_largest: there are no scores"):
        ops.kth_largest([], k)
    with pytest.raises(TypeError, match="must be a float tensor"):
        ops.kth_largest(torch.ones(4, dtype=torch.int32), 1)
