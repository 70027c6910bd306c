from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def lowest_ties(scores: list[np.ndarray], k: int | list[int]) -> list[np.ndarray]:
    if isinstance(k, int):
        order = np.argsort(-np.concatenate(scores), kind="stable")[:k]
        kept = np.zeros(sum(s.size for s in scores), bool)
        kept[order] = True
        return np.split(kept, np.cumsum([s.size for s in scores])[:-1])
    return [lowest_ties([s], n)[0] for s, n in zip(scores, k, strict=True)]


def draw(generator: np.random.Generator, size: int, kind: int) -> np.ndarray:
    values = generator.standard_normal(size)
    if kind == 1:
        values = generator.integers(-2, 3, size).astype(float)
    if kind == 2:
        values = values * 10.0 ** generator.integers(-40, 30, size)
    return values


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(
        st.sampled_from([0, 1, 31, 33, 512, 1000, 5000, 66_000]), min_size=1, max_size=4
    ),
    kind=st.integers(0, 2),
    keep=st.floats(0, 1),
    each=st.booleans(),
)
def test_equals_a_sort_of_the_products(seed, sizes, kind, keep, each) -> None:
    generator = np.random.default_rng(seed)
    weights, gradients, masks, scores = [], [], [], []
    for size in sizes:
        w, g = (
            torch.from_numpy(draw(generator, size, kind)).to(DTYPES[generator.integers(4)])
            for _ in range(2)
        )
        w, g = w.clamp(-3e4, 3e4), g.clamp(-3e4, 3e4)
        if generator.random() < 0.3 and size:  # every other element of something larger
            w = torch.stack([w, w], 1)[:, 0]
        score = np.abs(w.float().numpy() * g.float().numpy())
        if generator.random() < 0.3:
            kept = generator.random(size) < 0.6
            masks.append(ops.pack_mask(torch.from_numpy(kept)))
            score = np.where(kept, score, -np.inf)
        else:
            masks.append(None)
        weights.append(w)
        gradients.append(g)
        scores.append(score)
    k = [int(keep * n) for n in sizes] if each else int(keep * sum(sizes))
    packed = ops.topk_mask_product(weights, gradients, k, masks=masks)
    for bits, size, truth in zip(packed, sizes, lowest_ties(scores, k), strict=True):
        assert np.array_equal(ops.unpack_mask(bits, (size,)).numpy(), truth)


def test_is_the_mask_of_the_materialised_product() -> None:
    generator = torch.Generator().manual_seed(3)
    w, g = (torch.randn(700, 900, generator=generator) for _ in range(2))
    for view in (lambda t: t, lambda t: t.T, lambda t: t[::3, 5:]):
        x, y = view(w), view(g)
        k = x.numel() // 7
        expected = ops.topk_mask((x * y).abs(), k)[0]
        assert torch.equal(ops.topk_mask_product(x, y, k)[0], expected)
        with registry.using("reference"):
            assert torch.equal(ops.topk_mask_product(x, y, k)[0], expected)


def test_nan_is_named() -> None:
    with pytest.raises(NonFiniteScoreError, match=r"fc\.weight"):
        ops.topk_mask_product(
            [torch.ones(3), torch.tensor([0.0, 1.0])],
            [torch.ones(3), torch.tensor([float("inf"), 1.0])],
            2,
            names=["conv.weight", "fc.weight"],
        )


def test_nan_outside_the_candidates_does_not_count() -> None:
    w = torch.tensor([float("nan"), 1.0, 2.0])
    only = ops.pack_mask(torch.tensor([False, True, True]))
    bits = ops.topk_mask_product(w, torch.ones(3), 1, masks=[only])[0]
    assert ops.unpack_mask(bits, (3,)).tolist() == [False, False, True]


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="topk_mask_product: gradients must have the shapes"):
        ops.topk_mask_product(torch.ones(3), torch.ones(4), 1)
