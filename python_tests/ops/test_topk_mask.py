from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.selection_cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    Problem,
    equal,
    lexsort_masks,
    make_scores,
    problems,
    unpacked,
)

ROOT = Path(__file__).parents[2]
# Around the block of 512, the limit below which every score is a candidate, and one chunk.
SIZES = (511, 513, 4096, 4097, 65_535, 65_537, 300_000)


def run(problem: Problem) -> list[Tensor]:
    packed = ops.topk_mask(
        problem.scores, problem.k, exponents=problem.exponents, absolute=problem.absolute
    )
    for bits, scores in zip(packed, problem.scores, strict=True):
        assert bits.dtype == torch.uint8
        assert bits.shape == ((scores.numel() + 7) // 8,)
        spare = 8 * bits.numel() - scores.numel()
        assert not bits.numel() or int(bits[-1]) >> (8 - spare) == 0
    return unpacked(packed, problem.scores)


def oracle(problem: Problem) -> list[Tensor]:
    return lexsort_masks(problem.scores, problem.k, problem.exponents, problem.absolute)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(problems())
def test_topk_mask_equals_lexsort(problem: Problem) -> None:
    assert equal(run(problem), oracle(problem))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_topk_mask_reference_equals_lexsort(problem: Problem) -> None:
    with registry.using("reference"):
        assert equal(run(problem), oracle(problem))


@pytest.mark.slow
@settings(max_examples=100_000, deadline=None)
@given(problems())
def test_topk_mask_equals_lexsort_many_times(problem: Problem) -> None:
    assert equal(run(problem), oracle(problem))


def test_lexsort_oracle_equals_rational_arithmetic() -> None:
    generator = np.random.default_rng(1)
    for dtype in DTYPES:
        scores = [make_scores(generator, 12, kind, dtype, "contiguous") for kind in KINDS]
        scores = [torch.where(s.isinf(), 0.5, s) for s in scores]
        exponents = [-1000, 3, 0, 1100, 70, -2]
        exact = [
            (-Fraction(value) * Fraction(2) ** e, i)
            for s, e in zip(scores, exponents, strict=True)
            for i, value in enumerate(s.tolist())
        ]
        ranked = sorted((value, index) for index, (value, _) in enumerate(exact))
        for k in (1, 20, 50):
            kept = torch.zeros(72, dtype=torch.bool)
            kept[[index for _, index in ranked[:k]]] = True
            found = lexsort_masks(scores, k, exponents)
            assert torch.equal(torch.cat(found), kept)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_mask_of_large_tensors(size: int, kind: str, dtype: torch.dtype) -> None:
    """Through the sampled band, and through the radix passes where ties fill the band."""
    scores = [make_scores(np.random.default_rng(size), size, kind, dtype, "contiguous")]
    for k in (1, size // 10, size // 2, size - 1):
        problem = Problem(scores, k, None, False)
        assert equal(run(problem), oracle(problem)), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["plain", "ties", "special"])
def test_topk_mask_over_layers_with_exponents(dtype: torch.dtype, kind: str) -> None:
    generator = np.random.default_rng(5)
    sizes, exponents = (70_000, 0, 513, 100_000, 8), [-3, 7, 40, 2, -100_000]
    scores = [make_scores(generator, n, kind, dtype, LAYOUTS[n % 3]) for n in sizes]
    for k in (1, 5_000, 85_000, sum(sizes) - 1):
        problem = Problem(scores, k, exponents, False)
        assert equal(run(problem), oracle(problem)), k


@pytest.mark.parametrize("period", [2, 8, 64, 152, 576, 768])
def test_topk_mask_of_periodic_scores(period: int) -> None:
    """Masks and channels repeat: a sample that met only one phase would miss the threshold."""
    scores = torch.randn(period).repeat(400_000 // period)
    scores[:: max(period // 2, 1)] = 0
    problem = Problem([scores], scores.numel() // 10, None, True)
    assert equal(run(problem), oracle(problem))


def test_topk_mask_by_hand() -> None:
    scores = torch.tensor([0.5, -3.0, 2.0, 2.0, -0.0, 0.0])
    assert ops.topk_mask(scores, 1)[0].tolist() == [0b100]
    assert ops.topk_mask(scores, 4)[0].tolist() == [0b11101]  # -0 ties with +0 and comes first
    assert ops.topk_mask(scores, 2, absolute=True)[0].tolist() == [0b110]
    two = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 4.0])]
    assert [b.tolist() for b in ops.topk_mask(two, [1, 0])] == [[1], [0]]
    assert [b.tolist() for b in ops.topk_mask(two, 2, exponents=[2, 0])] == [[0b11], [0]]


def test_topk_mask_keeps_negatives_below_zero_whatever_the_exponents() -> None:
    scores = [torch.tensor([-1.0, 0.0]), torch.tensor([1e-45, -1.0])]
    packed = ops.topk_mask(scores, 2, exponents=[900, -900])
    assert [bits.tolist() for bits in packed] == [[0b10], [0b01]]


def test_topk_mask_of_subnormals_when_they_are_flushed() -> None:
    scores = torch.arange(2000).float() * 1e-44
    wanted = lexsort_masks([scores], 700)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        found = unpacked(ops.topk_mask(scores, 700), [scores])
    finally:
        torch.set_flush_denormal(False)
    assert equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 5_000, 140_000])
@pytest.mark.parametrize("k", ["none", "some", "all"])
def test_topk_mask_refuses_nan_by_name(dtype: torch.dtype, size: int, k: str) -> None:
    good, bad = torch.rand(size).to(dtype), torch.rand(size).to(dtype)
    bad[size // 2] = math.nan
    kept = {"none": 0, "some": 2, "all": 3 * size}[k]
    with pytest.raises(NonFiniteScoreError, match=r"fc\.weight hold NaN"):
        ops.topk_mask([good, bad, bad], kept, names=["conv", "fc.weight", "head"])
    with pytest.raises(NonFiniteScoreError, match=r"scores\[1\]"):
        ops.topk_mask([good, bad, bad], kept, exponents=[0, 3, 5])


def test_topk_mask_names_the_first_nan_behind_a_full_band() -> None:
    tied = torch.zeros(140_000)
    tied[-1] = math.nan
    later = torch.rand(100)
    later[0] = math.nan
    with pytest.raises(NonFiniteScoreError, match="tied"):
        ops.topk_mask([tied, later], 70_000, names=["tied", "later"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: ops.topk_mask(s, 11), r"k must be in \[0, 10\], got 11"),
        (lambda s: ops.topk_mask(s, -1), r"k must be in \[0, 10\], got -1"),
        (lambda s: ops.topk_mask([s, s], [11, 0]), r"k\[0\] must be in \[0, 10\], got 11"),
        (lambda s: ops.topk_mask([s, s], [1]), "1 values of k for 2 tensors"),
        (lambda s: ops.topk_mask([s], 1, exponents=[1, 2]), "2 exponents for 1 tensors"),
        (lambda s: ops.topk_mask([s, s], 1, exponents=[0, 2**21]), "differ by more than 1000000"),
        (lambda s: ops.topk_mask([s, s], 1, names=["a"]), "1 names for 2 tensors"),
    ],
)
def test_topk_mask_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.rand(10))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_topk_mask_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"scores\[1\] must be a float tensor"):
        ops.topk_mask([torch.rand(2), torch.ones(2).to(dtype)], 1)


def test_topk_mask_takes_numpy_integers_and_no_tensors() -> None:
    assert ops.topk_mask([], 0) == []
    assert ops.topk_mask(torch.rand(8), np.int64(8))[0].tolist() == [255]


def test_topk_mask_leaves_gradients_alone() -> None:
    scores = torch.rand(10, requires_grad=True)
    assert not ops.topk_mask(scores, 3)[0].requires_grad


def digest(threads: int) -> str:
    """Over masks that pass through every path: bands, radix, ties, factored, many layers."""
    torch.set_num_threads(threads)
    found = hashlib.sha256()
    for size in (1000, 150_000):
        for kind in ("plain", "ties", "special"):
            generator = np.random.default_rng(size)
            for dtype in DTYPES:
                scores = make_scores(generator, size, kind, dtype, "contiguous")
                layers = list(scores.split(size // 3))
                for packed in (
                    ops.topk_mask(scores, size // 7, absolute=True),
                    ops.topk_mask(layers, size // 2, exponents=[4, 0, -7, 1][: len(layers)]),
                    ops.topk_mask(layers, [layer.numel() // 3 for layer in layers]),
                ):
                    for bits in packed:
                        found.update(bits.numpy().tobytes())
    generator = np.random.default_rng(3)
    for dtype in DTYPES[:3]:
        weight = make_scores(generator, 199_800, "plain", dtype, "contiguous").reshape(333, 600)
        a, g = torch.rand(600), torch.rand(333)
        candidates = ops.topk_mask(weight, 100_000)
        for power in (1, 2):
            for bits in ops.topk_mask_factored(
                [weight, weight], [a, a], [g, g], [0, 3], 40_000,
                power=power, masks=[candidates[0], None],
            ):  # fmt: skip
                found.update(bits.numpy().tobytes())
        mask = ops.unpack_mask(candidates[0], weight.shape)
        found.update(ops.pack_mask(mask).numpy().tobytes())
        found.update(ops.apply_mask_(weight, candidates[0]).double().numpy().tobytes())
    return found.hexdigest()


CODE = """
import torch
from paikern.backends import cpu
from python_tests.ops.test_topk_mask import digest
torch.manual_seed(0); one = digest(1)
torch.manual_seed(0); two = digest(2)
print(cpu.isa(), one, two)
"""


@pytest.fixture(scope="module")
def expected_digest() -> str:
    torch.manual_seed(0)
    with registry.using("reference"):
        threads = torch.get_num_threads()
        try:
            return digest(1)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_masks_of_each_instruction_set_and_thread_count(isa: str, expected_digest: str) -> None:
    environment = {**os.environ, "PAIKERN_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ran, one, two = done.stdout.split()
    if ran != isa:
        pytest.skip(f"this CPU has no {isa}: ran {ran}")
    assert one == two == expected_digest
