"""Inputs that a selection meets rarely: each of these once gave a wrong answer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import paikern as pk
from paikern import ops


def kept(bits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return ops.unpack_mask(bits, shape)


def stable(scores: torch.Tensor, k: int) -> torch.Tensor:
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices[:k]
    return torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, order, True)


@pytest.fixture
def flush_denormal() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1000, 2048, 4000])
@pytest.mark.parametrize("every", [64, 2, 1000])
def test_evenly_spaced_zeros_below_negative_thresholds(dtype, k, every) -> None:
    scores = -torch.rand(4096, generator=torch.Generator().manual_seed(1)) - 0.1
    scores[::every] = 0.0
    scores = scores.to(dtype)
    wide = torch.tensor([[0.0, 1e6]], dtype=torch.float64)  # everything is a candidate
    bits = ops.topk_mask(scores, k, memory=wide)[0]
    assert torch.equal(kept(bits, (4096,)), stable(scores, k))
    assert wide[0, 0].item() == torch.sort(scores, descending=True).values[k - 1].double().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("off", [-1000, -1, 0, 1, 1000])
def test_ranks_beside_a_value_that_most_scores_have(dtype, absolute: bool, off: int) -> None:
    """A mostly pruned network, from which a little more is pruned or a little less."""
    generator = torch.Generator().manual_seed(3)
    size = 300_000
    scores = torch.randn(size, generator=generator, dtype=dtype)
    scores[torch.rand(size, generator=generator) < 0.8] = 0.0
    scores[::7] *= -1.0  # some zeros are -0
    ranked = scores.abs() if absolute else scores
    for k in (int((ranked > 0).sum()) + off, int((ranked >= 0).sum()) + min(off, 0)):
        found = ops.topk_mask(scores, k, absolute=absolute)[0]
        assert torch.equal(kept(found, (size,)), stable(ranked, k))
        expected = torch.sort(ranked, descending=True).values[k - 1]
        if not absolute:
            assert ops.kth_largest(scores, k) == expected


def test_computed_scores_whose_sample_overflows() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.rand(200, 300, generator=generator) + 0.1
    # Sums overflow, single products do not: two of them rounded apart would give inf - inf.
    a = torch.rand(8, 300, generator=generator) * 2e38
    sign = torch.where(torch.rand(8, 200, generator=generator) < 0.5, -1.0, 1.0)
    g = sign * torch.rand(8, 200, generator=generator) * 1.5
    score = ops.path_score(w, a, g)
    assert score.isinf().any()
    assert not score.isnan().any()
    bits = ops.topk_mask_factored([w], [a], [g], [0], 100)[0]
    assert torch.equal(bits, ops.topk_mask(score, 100)[0])


def test_maps_of_a_layer_without_inputs() -> None:
    full = torch.ones(3, 2)
    bits = ops.topk_mask_factored(
        [torch.empty(4, 0), full, torch.empty(2, 0, 3, 3)],
        [torch.rand(2, 0), torch.ones(2, 2), torch.rand(1, 0, 8, 8)],
        [torch.rand(2, 4), torch.ones(2, 3), torch.rand(1, 2, 6, 6)],
        [0, 0, 0],
        4,
        convs=[None, None, ((1, 1), (0, 0), (1, 1), 1)],
    )
    assert [b.tolist() for b in bits] == [[], [0b1111], []]


# Integers, and compared as such: with the mode on, Python and torch read such floats as zeros.
SUBNORMALS = {
    torch.float32: (torch.int32, 3 * 2.0**-149),
    torch.float64: (torch.int64, float(np.array(3).view(np.float64))),
}


@pytest.mark.parametrize("dtype", SUBNORMALS)
def test_subnormal_scores_count_where_they_are_flushed(dtype, flush_denormal) -> None:
    words, third = SUBNORMALS[dtype]
    scores = torch.tensor([1, 5, 3, 2], dtype=words).view(dtype)
    assert kept(ops.topk_mask(scores, 2)[0], (4,)).tolist() == [False, True, True, False]
    found = np.float64(ops.kth_largest(scores, 2))
    assert found.view(np.int64) == np.float64(third).view(np.int64) != 0


def test_subnormal_blocks_count_where_they_are_flushed(flush_denormal) -> None:
    values = torch.tensor([[100, 100, 300, 300]], dtype=torch.int32).view(torch.float32)
    scores = pk.Scores({"w": pk.Dense(values)}, {"w": (1, 4)})
    masks = pk.select(scores, sparsity=0.5, pattern="block:1x2")
    assert masks["w"].tolist() == [[False, False, True, True]]


def test_subnormal_groups_of_factored_scores(flush_denormal) -> None:
    w = torch.tensor([[1e-20, 1e-20, 3e-20, 3e-20]])
    bits = ops.nm_mask_factored([w], [torch.full((4,), 1e-20)], [torch.ones(1)], 1, 4)[0]
    assert kept(bits, (1, 4)).tolist() == [[False, False, True, False]]


def test_negated_views_are_read_as_what_they_are() -> None:
    z = torch.complex(torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0])).conj().imag
    assert z.is_neg()
    assert kept(ops.topk_mask(z, 1)[0], (4,)).tolist() == [True, False, False, False]
    assert ops.kth_largest(z, 1) == -1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda x, m: ops.topk_mask([x, m], 1),
        lambda x, m: ops.topk_mask_product(x, m, 1),
        lambda x, m: ops.topk_mask_factored([x[None]], [m], [x[:1]], [0], 1),
        lambda x, m: ops.topk_mask(x, 1, memory=m.new_zeros(1, 2, dtype=torch.float64)),
    ],
)
def test_mixed_devices_are_refused(call) -> None:
    with pytest.raises(ValueError, match="tensors are on cpu and meta; move them to one device"):
        call(torch.rand(4), torch.rand(4, device="meta"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.topk_mask(x, 1.5), "topk_mask: k must be an integer"),
        (lambda x: ops.topk_mask(x, None), "topk_mask: k must be an integer"),
        (lambda x: ops.topk_mask(x, "3"), "topk_mask: k must be an integer"),
        (lambda x: ops.topk_mask(x, [1.5]), "topk_mask: k must be an integer"),
        (lambda x: ops.topk_mask(x, 1, exponents=[0.5]), "exponents must be integers"),
        (lambda x: ops.topk_mask([1.0, 2.0], 1), "got float at 0"),
        (lambda x: ops.topk_mask(x.numpy(), 1), "torch.from_numpy"),
        (lambda x: ops.topk_mask(x.to_sparse(), 1), "must be dense"),
        (lambda x: ops.kth_largest(x, 1.5), "kth_largest: k must be an integer, got 1.5"),
        (lambda x: ops.kth_largest([], 1), "there are no scores"),
        (
            lambda x: ops.topk_mask_factored(
                [torch.ones(1, 1, 1)], [torch.ones(1, 1, 4)], [torch.ones(1, 1, 4)], [0], 1,
                convs=[(1, 1, 1, 1)],
            ),
            "convs must hold",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_clear_line(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        call(torch.rand(4))
    assert "\n" not in str(caught.value)


def test_counts_may_be_arrays() -> None:
    scores = [torch.rand(4), torch.rand(5)]
    expected = ops.topk_mask(scores, [1, 2])
    for k in (np.array([1, 2]), torch.tensor([1, 2]), (1, 2)):
        assert all(map(torch.equal, ops.topk_mask(scores, k), expected))
    assert torch.equal(ops.topk_mask(scores[0], np.int64(3))[0], ops.topk_mask(scores[0], 3)[0])


def test_only_differences_of_exponents_matter() -> None:
    scores = [torch.rand(40), torch.rand(50)]
    near = ops.topk_mask(scores, 20, exponents=[0, 1])
    far = ops.topk_mask(scores, 20, exponents=[10**25, 10**25 + 1])
    assert all(map(torch.equal, near, far))


def test_kth_largest_names_nan() -> None:
    with pytest.raises(pk.NonFiniteScoreError, match=r"fc\.weight"):
        ops.kth_largest([torch.tensor([1.0, math.nan])], 1, names=["fc.weight"])
