from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.pattern_cases import (
    LAYOUTS,
    Groups,
    best_of_groups,
    group_problems,
    laid_out,
    unpacked,
)
from python_tests.ops.selection_cases import DTYPES, KINDS, equal, make_scores


def run(problem: Groups) -> list[Tensor]:
    packed = ops.nm_mask(
        problem.scores, problem.n, problem.m, dims=problem.dims, absolute=problem.absolute
    )
    return unpacked(packed, problem.scores)


def oracle(problem: Groups) -> list[Tensor]:
    return [
        best_of_groups(s, problem.n, problem.m, dim, problem.absolute)
        for s, dim in zip(problem.scores, problem.dims, strict=True)
    ]


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(group_problems())
def test_nm_mask_equals_sorted_groups(problem: Groups) -> None:
    assert equal(run(problem), oracle(problem))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(group_problems())
def test_nm_mask_reference_equals_sorted_groups(problem: Groups) -> None:
    with registry.using("reference"):
        assert equal(run(problem), oracle(problem))


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None)
@given(group_problems())
def test_nm_mask_equals_sorted_groups_many_times(problem: Groups) -> None:
    assert equal(run(problem), oracle(problem))


@pytest.mark.parametrize("m", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nm_mask_of_every_pattern_up_to_16(m: int, dtype: torch.dtype) -> None:
    """Several tiles and chunks, an odd end, both orientations."""
    generator = np.random.default_rng(m)
    scores = make_scores(generator, 37 * 2051, "ties", dtype, "contiguous").reshape(37, 2051)
    for dim in (0, 1):
        values = (scores.double().abs()).movedim(dim, -1)
        order = torch.arange(values.shape[-1])
        for n in range(1, m + 1):
            (mask,) = unpacked(ops.nm_mask(scores, n, m, dims=dim, absolute=True), [scores])
            kept = mask.movedim(dim, -1)
            whole = order.numel() // m * m
            counts = kept[:, :whole].unflatten(1, (-1, m)).sum(2)
            assert bool((counts == n).all())
            rest = order.numel() - whole
            assert bool((kept[:, whole:].sum(1) == -(-rest * n // m)).all())
            # No pruned score of a group ranks before a kept one.
            groups = values[:, :whole].unflatten(1, (-1, m))
            held = kept[:, :whole].unflatten(1, (-1, m))
            worst = groups.masked_fill(~held, math.inf).amin(2)
            best = groups.masked_fill(held, -math.inf).amax(2)
            assert bool((worst >= best).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(96, 1030), (70, 33, 3, 3), (3, 5, 9000)], ids=str)
def test_nm_mask_of_large_weights(shape: tuple[int, ...], layout: str, kind: str) -> None:
    generator = np.random.default_rng(4)
    flat = make_scores(generator, math.prod(shape), kind, torch.float32, "contiguous")
    scores = laid_out(flat.reshape(shape), layout)
    for n, m in ((2, 4), (3, 5)):
        found = unpacked(ops.nm_mask(scores, n, m), [scores])
        assert torch.equal(found[0], best_of_groups(scores, n, m, 1, False)), (n, m)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nm_mask_of_transposed_views(dtype: torch.dtype) -> None:
    """Their columns lie side by side, and rows are taken a line of memory at a time."""
    generator = np.random.default_rng(2)
    for rows, columns in ((1, 64), (33, 120), (300, 840), (70, 4096)):
        flat = make_scores(generator, rows * columns, "ties", dtype, "contiguous")
        scores = flat.reshape(columns, rows).T
        for n, m in ((2, 4), (1, 3), (5, 8)):
            found = unpacked(ops.nm_mask(scores, n, m, absolute=True), [scores])
            wanted = ops.nm_mask(scores.contiguous(), n, m, absolute=True)
            assert equal(found, unpacked(wanted, [scores]))
        cube = flat.reshape(columns, rows, 1).permute(1, 2, 0)
        assert equal(ops.nm_mask(cube, 2, 4, dims=2), ops.nm_mask(scores, 2, 4))
        split = scores.unflatten(1, (2, columns // 2))
        assert equal(
            ops.nm_mask(split, 1, 4, dims=2), ops.nm_mask(split.contiguous(), 1, 4, dims=2)
        )
        # A transposed view holds NaN no better than others.
        bad = scores.clone(memory_format=torch.preserve_format)
        bad[rows - 1, columns - 1] = math.nan
        with pytest.raises(NonFiniteScoreError):
            ops.nm_mask(bad, 2, 4)


def test_nm_mask_by_hand() -> None:
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0], [5.0, 5.0, 5.0, 5.0, 0.0]])
    # One left over keeps ceil(1 * 2 / 4) = 1; ties keep the lower index.
    rows = [[False, True, True, False, True], [True, True, False, False, True]]
    assert unpacked(ops.nm_mask(scores, 2, 4), [scores])[0].tolist() == rows
    (columns,) = unpacked(ops.nm_mask(scores, 1, 2, dims=0), [scores])
    assert columns.tolist() == [[False, False, False, False, True], [True, True, True, True, False]]


def test_nm_mask_zeros_of_both_signs_tie() -> None:
    scores = torch.tensor([[-0.0, 0.0, 0.0, -0.0], [-1.0, 0.0, -0.0, -1.0]])
    assert ops.nm_mask(scores, 2, 4)[0].tolist() == [0b01100011]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [4, 7, 40])
@pytest.mark.parametrize("size", [80, 8000])
def test_nm_mask_refuses_nan_by_name(dtype: torch.dtype, m: int, size: int) -> None:
    good, bad = torch.rand(20, size).to(dtype), torch.rand(20, size).to(dtype)
    bad[13, size - 1] = -math.nan
    with pytest.raises(NonFiniteScoreError, match=r"fc\.weight hold NaN"):
        ops.nm_mask([good, bad, bad], 1, m, names=["conv", "fc.weight", "head"])
    with pytest.raises(NonFiniteScoreError, match=r"scores\[1\]"):
        ops.nm_mask([good, bad.T], 1, m, dims=[1, 0], absolute=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ops.nm_mask(s, 0, 4), "needs 1 <= n <= m, got 0:4"),
        (lambda s: ops.nm_mask(s, 5, 4), "needs 1 <= n <= m, got 5:4"),
        (lambda s: ops.nm_mask(s, 2, 4, dims=2), r"dims\[0\] is 2, but scores\[0\] has the shape"),
        (lambda s: ops.nm_mask([s, s], 2, 4, dims=[1]), "1 dims for 2 tensors"),
        (lambda s: ops.nm_mask([s, s], 2, 4, names=["a"]), "1 names for 2 tensors"),
    ],
)
def test_nm_mask_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.rand(4, 8))


def test_nm_mask_of_nothing_and_of_negative_dims() -> None:
    assert ops.nm_mask([], 2, 4) == []
    scores = torch.rand(6, 8)
    assert equal(ops.nm_mask(scores, 2, 4, dims=-1), ops.nm_mask(scores, 2, 4, dims=1))
    with pytest.raises(TypeError, match=r"scores\[0\] must be a float tensor"):
        ops.nm_mask(torch.ones(4, 4, dtype=torch.int64), 2, 4)


def test_nm_mask_of_subnormals_when_they_are_flushed() -> None:
    scores = (torch.arange(2000).float() * 1e-44).flip(0).reshape(4, 500)
    wanted = best_of_groups(scores, 2, 5, 1, False)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        (found,) = unpacked(ops.nm_mask(scores, 2, 5), [scores])
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, wanted)
