"""The checks and the rounding of amounts, and dimensions and norms of channels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune as torch_prune

from paikern import torch_prune as prune


@pytest.mark.parametrize("amount", ["half", None, [1], 1j, torch.tensor(0.5)])
def test_no_number(amount: object) -> None:
    with pytest.raises(TypeError, match=r"amount: must be an int or a float"):
        prune._validate_pruning_amount_init(amount)


@pytest.mark.parametrize("amount", [1.1, 20.0, -0.1, -1, np.int64(-3), math.inf])
def test_out_of_range(amount: float) -> None:
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\] or a count >= 0"):
        prune._validate_pruning_amount_init(amount)


@pytest.mark.parametrize("amount", [0, 0.0, 1.0, 0.34, 1500, True, np.float32(0.5), Fraction(1, 3)])
def test_in_range(amount: float) -> None:
    prune._validate_pruning_amount_init(amount)


def test_a_count_above_what_is_left() -> None:
    with pytest.raises(ValueError, match="must be at most 19, what is left, got 20"):
        prune._validate_pruning_amount(20, 19)
    prune._validate_pruning_amount(19, 19)
    prune._validate_pruning_amount(0.3, 0)


@pytest.mark.parametrize(
    ("amount", "size", "count"),
    [(0, 15, 0), (10, 15, 10), (1, 15, 1), (0.4, 17, 7), (0.5, 5, 2), (0.5, 7, 4), (1.0, 9, 9)],
)
def test_count(amount: float, size: int, count: int) -> None:
    assert prune._compute_nparams_toprune(amount, size) == count


@given(
    st.one_of(st.floats(0, 1), st.integers(0, 10**9), st.fractions(0, 1)),
    st.integers(0, 10**12),
)
def test_count_is_that_of_torch(amount: float, size: int) -> None:
    expected = torch_prune._compute_nparams_toprune(amount, size)
    assert prune._compute_nparams_toprune(amount, size) == expected


def test_nan_amount_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        prune._compute_nparams_toprune(math.nan, 4)


def test_channels_need_two_dimensions() -> None:
    with pytest.raises(ValueError, match=r"2 or more dimensions, got shape \[4\]"):
        prune._validate_structured_pruning(torch.ones(4))
    prune._validate_structured_pruning(torch.ones(4, 1))


@pytest.mark.parametrize("dim", [2, 7, -3])
def test_no_such_dimension(dim: int) -> None:
    with pytest.raises(IndexError, match=r"dim: must be in \[-2, 1\]"):
        prune._validate_pruning_dim(torch.ones(4, 1), dim)


@pytest.mark.parametrize("n", [0, 1, 2, 3.5, math.inf, -math.inf, "fro"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_norm_is_that_of_torch(n: float | str, dim: int) -> None:
    t = torch.randn(3, 4, 5)
    assert torch.equal(prune._compute_norm(t, n, dim), torch_prune._compute_norm(t, n, dim))


def test_norm_by_hand() -> None:
    t = torch.tensor([[3.0, 0.0], [-4.0, 1.0]])
    assert prune._compute_norm(t, 2, 1).tolist() == [5.0, 1.0]
    assert prune._compute_norm(t, 1, 0).tolist() == [3.0, 5.0]
