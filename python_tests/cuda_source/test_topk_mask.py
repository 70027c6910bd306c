"""Selection by the CUDA sources: the CPU suite's problems, and sizes around tiles and samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.selection_cases import (
    ALL_KINDS,
    ALL_LAYOUTS,
    lexsort_kept,
    make_scores,
    packed_bytes,
    random_problem,
)

pytestmark = pytest.mark.cuda_source
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Around a word, a warp's share, a tile, the sample and the eight blocks that the tests have.
SIZES = (0, 1, 31, 33, 1000, 1023, 1025, 8191, 8193, 16_384, 16_385, 70_001, 300_000)


def on_cuda_source(scores: list[Tensor], k: int | list[int], **options: object) -> list[bytes]:
    with registry.using("cuda_source"):
        packed = ops.topk_mask(scores, k, **options)
    return [bits.numpy().tobytes() for bits in packed]


def on_cpu(scores: list[Tensor], k: int | list[int], **options: object) -> list[bytes]:
    return [bits.numpy().tobytes() for bits in ops.topk_mask(scores, k, **options)]


@pytest.mark.parametrize("group", ["small", "crowd", "border", "large"])
def test_problems_of_the_cpu_suite(group: str) -> None:
    generator = np.random.default_rng(7)
    for _ in range({"small": 60, "crowd": 15, "border": 25, "large": 12}[group]):
        problem = random_problem(generator, group)
        scores = [s.float() if s.dtype == torch.float64 else s for s in problem.scores]
        options = {"exponents": problem.exponents, "absolute": problem.absolute}
        found = on_cuda_source(scores, problem.k, **options)
        kept = lexsort_kept(scores, problem.k, problem.exponents, problem.absolute)
        assert found == [packed_bytes(part) for part in kept]
        assert found == on_cpu(scores, problem.k, **options)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_k_at_the_edges(size: int, dtype: torch.dtype) -> None:
    scores = torch.randn(size).to(dtype)
    for k in {0, 1, size // 50, size // 2, size - 1, size} & set(range(size + 1)):
        assert on_cuda_source([scores], k) == on_cpu([scores], k), k
        assert on_cuda_source([scores], k, absolute=True) == on_cpu([scores], k, absolute=True), k


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_kinds_of_scores_above_one_tile(kind: str) -> None:
    generator = np.random.default_rng(3)
    scores = make_scores(generator, 100_003, kind, torch.float32, "contiguous")
    for k in (1, 100, 50_000, 99_990):
        assert on_cuda_source([scores], k) == on_cpu([scores], k), k


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(4)
    scores = [make_scores(generator, size, "ties", dtype, layout) for size in (24, 1000, 12_000)]
    assert on_cuda_source(scores, 5000) == on_cpu(scores, 5000)


def test_ties_are_cut_in_every_tile() -> None:
    """Where the last of equal scores stays must not depend on how tiles are shared out."""
    scores = torch.zeros(70_000)
    scores[::7] = 1.0
    for k in (1, 9_999, 10_000, 10_001, 17_000, 40_000, 69_999):
        assert on_cuda_source([scores], k) == on_cpu([scores], k), k


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_quantised_scores_overflow_the_band_and_fall_back(levels: int) -> None:
    scores = [torch.randint(0, levels, (n,)).float() for n in (200_000, 8_192, 50_001)]
    total = sum(s.numel() for s in scores)
    for k in (1, total // 10, total // 2, total - 1):
        assert on_cuda_source(scores, k) == on_cpu(scores, k), k
    exponents = [0, 5, -3]
    assert on_cuda_source(scores, 99_999, exponents=exponents) == on_cpu(
        scores, 99_999, exponents=exponents
    )


def test_a_misleading_sample_falls_back() -> None:
    """All large scores lie where no sample is taken: 100,000 equal ones and a crowd between."""
    scores = torch.linspace(0, 1, 300_000)
    scores[100_000:100_015] = torch.arange(15) + 10.0
    for k in (1, 7, 15, 16):
        assert on_cuda_source([scores], k) == on_cpu([scores], k), k


def test_many_small_layers_each_with_its_count() -> None:
    generator = np.random.default_rng(5)
    sizes = generator.integers(0, 400, 150)
    scores = [make_scores(generator, int(n), "ties", torch.float32, "contiguous") for n in sizes]
    k = [int(generator.integers(0, n + 1)) for n in sizes]
    assert on_cuda_source(scores, k, absolute=True) == on_cpu(scores, k, absolute=True)
    assert on_cuda_source(scores, sum(k)) == on_cpu(scores, sum(k))


def test_layers_of_all_dtypes_and_sizes_each_with_its_count() -> None:
    scores = [torch.randn(n).to(t) for n in (8193, 0, 70_000, 5, 20_000) for t in DTYPES]
    k = [s.numel() // 3 for s in scores]
    assert on_cuda_source(scores, k) == on_cpu(scores, k)
    assert on_cuda_source(scores, sum(k)) == on_cpu(scores, sum(k))


@pytest.mark.parametrize("absolute", [False, True])
def test_candidates(absolute: bool) -> None:
    scores = [torch.randn(n) for n in (1000, 8200, 33)]
    masks = [ops.pack_mask(torch.rand(n) < 0.3) for n in (1000, 8200)]
    scores[0][:50] = -torch.inf
    excluded = ~ops.unpack_mask(masks[1], (8200,))
    scores[1][excluded] = torch.nan  # does not count
    for k in (0, 5, 1500, 4000, 9000):
        options = {"masks": [*masks, None], "absolute": absolute}
        assert on_cuda_source(scores, k, **options) == on_cpu(scores, k, **options), k
    with pytest.raises(NonFiniteScoreError, match="scores of b hold NaN"):
        on_cuda_source(scores, 5, masks=[masks[0], None, None], names=["a", "b", "c"])


@pytest.mark.parametrize("k", [0, 100, 50_033, [5, 40_000, 0]])
def test_the_first_layer_with_nan_is_named(k: int | list[int]) -> None:
    scores = [torch.randn(10_000), torch.randn(40_000), torch.randn(33)]
    scores[1][39_999] = torch.nan
    scores[2][0] = -torch.nan
    with pytest.raises(NonFiniteScoreError, match=r"scores\[1\] holds NaN"):
        on_cuda_source(scores, k)


@pytest.mark.parametrize("size", [1, 513, 16_385, 100_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kth_largest(size: int, dtype: torch.dtype) -> None:
    scores = [torch.randn(size).to(dtype), torch.tensor([-0.0, torch.inf]).to(dtype)]
    for k in (1, 2, size // 2 + 1, size + 2):
        with registry.using("cuda_source"):
            found = ops.kth_largest(scores, k)
        assert found == ops.kth_largest(scores, k), k
    scores[0][-1] = torch.nan
    with registry.using("cuda_source"), pytest.raises(NonFiniteScoreError, match=r"scores\[0\]"):
        ops.kth_largest(scores, 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=200), st.data())
def test_any_floats_at_any_exponents(values: list[float], data: st.DataObject) -> None:
    half = len(values) // 2
    scores = [torch.tensor(values[:half]), torch.tensor(values[half:])]
    exponents = [data.draw(st.integers(-200, 200)), data.draw(st.integers(-500_000, 400_000))]
    k = data.draw(st.integers(0, len(values)))
    found = on_cuda_source(scores, k, exponents=exponents)
    assert found == on_cpu(scores, k, exponents=exponents)


def test_memory_is_taken_and_changes_no_mask() -> None:
    scores, memory = torch.randn(20_000), torch.full((1, 2), torch.nan, dtype=torch.float64)
    assert on_cuda_source([scores], 777, memory=memory) == on_cpu([scores], 777)


def test_float64_scores_are_ranked_as_they_are() -> None:
    scores = [1.0 + torch.arange(100, dtype=torch.float64).flip(0) * 2.0**-40, torch.ones(5)]
    assert on_cuda_source(scores, 30) == on_cpu(scores, 30)
    with registry.using("cuda_source"):
        assert ops.kth_largest(scores, 1) == 1.0 + 99 * 2.0**-40
