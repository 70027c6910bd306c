"""The choice of weights, of one tensor and of many, first time and again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paikern import NonFiniteScoreError, ops
from paikern.torch_prune.select import (
    all_ones,
    count,
    keep_channels,
    keep_largest,
    keep_random,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def chosen(scores: list[Tensor], kept: list[Tensor], removed: int) -> list[Tensor]:
    """The masks by a stable sort: what is left, by magnitude, lower index first."""
    magnitude = torch.cat([s.double().abs().reshape(-1) for s in scores])
    left = torch.cat([k.reshape(-1) for k in kept])
    magnitude[~left] = -1
    order = torch.sort(magnitude, descending=True, stable=True).indices
    mask = torch.zeros_like(left)
    mask[order[: int(left.sum()) - removed]] = True
    sizes = [s.numel() for s in scores]
    return [part.reshape(s.shape) for part, s in zip(mask.split(sizes), scores, strict=True)]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor | None], int]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtypes = draw(st.sampled_from([[d] for d in DTYPES] + [DTYPES[:3], DTYPES]))
    scores, kept = [], []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 7), max_size=4))
        values = torch.randn(shape, generator=generator).to(draw(st.sampled_from(dtypes)))
        if draw(st.booleans()):  # ties
            values = values.round()
        scores.append(values)
        density = draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
        mask = torch.rand(shape, generator=generator) < (density or 0.0)
        kept.append(None if density is None else mask)
    left = sum(s.numel() if m is None else int(m.sum()) for s, m in zip(scores, kept, strict=True))
    return scores, kept, draw(st.integers(0, left))


@given(problems())
def test_largest_of_what_is_left(problem: tuple[list[Tensor], list[Tensor | None], int]) -> None:
    scores, kept, removed = problem
    bits = [None if mask is None else ops.pack_mask(mask) for mask in kept]
    found = keep_largest(scores, bits, removed, ["t"] * len(scores))
    before = [torch.ones(s.shape, dtype=torch.bool) if m is None else m
              for s, m in zip(scores, kept, strict=True)]  # fmt: skip
    expected = chosen(scores, before, removed)
    assert all(map(torch.equal, found, [ops.pack_mask(mask) for mask in expected]))


@given(problems())
def test_random_takes_from_what_is_left(
    problem: tuple[list[Tensor], list[Tensor | None], int],
) -> None:
    scores, kept, removed = problem
    bits = [None if mask is None else ops.pack_mask(mask) for mask in kept]
    found = keep_random(scores, bits, removed)
    left = [count(b, s.numel()) for s, b in zip(scores, bits, strict=True)]
    after = [count(b, s.numel()) for s, b in zip(scores, found, strict=True)]
    assert sum(left) - sum(after) == removed
    for old, new in zip(bits, found, strict=True):
        assert old is None or torch.equal(old & new, new)


def test_random_is_even() -> None:
    hits = torch.zeros(20)
    for _ in range(400):
        hits += ops.unpack_mask(keep_random([torch.ones(20)], [None], 5)[0], (20,))
    assert hits.sum() == 400 * 15
    # 300 expected each, standard deviation 8.7
    assert 260 < hits.min() <= hits.max() < 340


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 64])
def test_all_ones(numel: int) -> None:
    bits = all_ones(numel, torch.device("cpu"))
    assert torch.equal(bits, ops.pack_mask(torch.ones(numel, dtype=torch.bool)))
    assert count(bits, numel) == numel


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_refused_by_name(dtype: torch.dtype, again: bool) -> None:
    scores = [torch.ones(4, dtype=dtype), torch.tensor([1.0, math.nan, 2.0], dtype=dtype)]
    bits = [None, all_ones(3, torch.device("cpu")) if again else None]
    with pytest.raises(NonFiniteScoreError, match="the second"):
        keep_largest(scores, bits, 1, ["the first", "the second"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_that_is_pruned_already_does_not_count(dtype: torch.dtype) -> None:
    scores = torch.tensor([1.0, math.nan, 3.0, 2.0], dtype=dtype)
    kept = ops.pack_mask(torch.tensor([True, False, True, True]))
    (bits,) = keep_largest([scores], [kept], 1, ["t"])
    assert ops.unpack_mask(bits, (4,)).tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    (bits,) = keep_largest([torch.tensor([3, 1, 2], dtype=dtype)], [None], 1, ["t"])
    assert ops.unpack_mask(bits, (3,)).tolist() == [True, False, True]


@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=4),
    st.integers(0, 2**32),
    st.data(),
)
def test_channels(shape: list[int], seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator)
    before = torch.rand(shape, generator=generator) < 0.6
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    others = [d for d in range(len(shape)) if d != dim % len(shape)]
    alive = before.sum(others) != 0
    removed = data.draw(st.integers(0, int(alive.sum())))

    def scores(left: Tensor) -> Tensor:
        return left.abs().sum(others)

    bits = keep_channels(t, ops.pack_mask(before), removed, dim, scores, "t")
    after = ops.unpack_mask(bits, shape)
    still = after.sum(others) != 0
    assert int(still.sum()) == int(alive.sum()) - removed
    # A channel goes or stays as it was, and no removed one has a larger score than one that stays.
    lost = alive & ~still
    wide = lost.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])
    assert torch.equal(after, before & ~wide)
    sums = t.abs().sum(others)
    if lost.any() and still.any():
        assert sums[lost].max() <= sums[still].min()


def test_equal_channels_keep_the_first() -> None:
    t = torch.ones(2, 4)
    bits = keep_channels(t, None, 3, 1, lambda left: left.sum(0), "t")
    assert ops.unpack_mask(bits, (2, 4)).tolist() == [[True, False, False, False]] * 2


def test_nan_channel_is_refused_by_name() -> None:
    t = torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    with pytest.raises(NonFiniteScoreError, match="the channels of w"):
        keep_channels(t, None, 1, 1, lambda left: left.sum(0), "w")
