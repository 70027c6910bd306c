"""Selection against an oracle by `numpy.lexsort`, bit for bit, more than 20,000 cases a run.

An example of hypothesis is a seed, from which NumPy draws everything else: sizes from 0 to 10^6,
dtypes, values, strides, k, exponents. That costs a tenth of drawing them one by one, and a failure
names the seed: `random_problem(numpy.random.default_rng([RUN, *b"small", seed]), "small")`. A seed
has no smaller neighbour, so nothing is shrunk; `test_topk_mask.py` has strategies that shrink.

The seeds are the same in every run. `PAIKERN_TEST_SEED=n pytest ...` runs other ones.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from python_tests.ops.selection_cases import (
    ALL_KINDS,
    DTYPES,
    GROUPS,
    Problem,
    lexsort_kept,
    make_scores,
    packed_bytes,
    random_count,
    random_problem,
)

ROOT = Path(__file__).parents[2]
RUN = int(os.environ.get("PAIKERN_TEST_SEED", "0"))

#: Cases of each group in one run.
CASES = {"small": 14_000, "crowd": 2_600, "border": 3_000, "large": 380, "million": 20}
FACTORED_CASES = {"small": 3_000, "border": 600, "large": 60}
NAN_CASES = 1_500
KTH_CASES = 1_500
REFERENCE_CASES = 500
MEMORY_CASES = 1_000


def test_a_run_has_at_least_20_000_cases() -> None:
    """`for_seeds` checks that each of them is run, and is a different one."""
    assert sum(CASES.values()) >= 20_000
    assert set(CASES) == set(GROUPS)


def for_seeds(count: int, name: str, check: Callable[[np.random.Generator], None]) -> None:
    """Run `check` on the generators of `count` different seeds that hypothesis chooses."""
    seen: set[int] = set()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    @given(st.integers(0, 2**64 - 1))
    def run(seed: int) -> None:
        seen.add(seed)
        check(np.random.default_rng([RUN, *name.encode(), seed]))

    run()
    assert len(seen) == count


def as_bytes(packed: list[Tensor]) -> list[bytes]:
    return [bits.numpy().tobytes() for bits in packed]


def describe(problem: Problem) -> str:
    shapes = [(tuple(s.shape), s.stride(), str(s.dtype)) for s in problem.scores]
    return f"{shapes} k={problem.k} exponents={problem.exponents} absolute={problem.absolute}"


@pytest.mark.parametrize("group", GROUPS)
def test_topk_mask_equals_lexsort(group: str) -> None:
    def check(generator: np.random.Generator) -> None:
        problem = random_problem(generator, group)
        assert as_bytes(problem.packed()) == problem.expected(), describe(problem)

    for_seeds(CASES[group], group, check)


def test_topk_mask_with_candidates_and_any_memory_equals_lexsort() -> None:
    """What is no candidate ranks with -infinity; a memory may be of something else altogether."""

    def check(generator: np.random.Generator) -> None:
        group = ("small", "border", "large")[generator.choice(3, p=[0.5, 0.45, 0.05])]
        problem = random_problem(generator, group)
        kept = [
            generator.random(s.numel()) < 0.7 if generator.random() < 0.5 else None
            for s in problem.scores
        ]
        ranked = [s.abs() if problem.absolute else s for s in problem.scores]
        ranked = [
            s if m is None else s.masked_fill(~torch.from_numpy(m).reshape(s.shape), -math.inf)
            for s, m in zip(ranked, kept, strict=True)
        ]
        rankings = 1 if isinstance(problem.k, int) else len(problem.k)
        memory = torch.from_numpy(
            generator.choice(
                [0.0, -1.0, 0.3, 2.0, 1e-300, 1e300, math.inf, math.nan], (rankings, 2)
            )
        )
        wanted = [packed_bytes(m) for m in lexsort_kept(ranked, problem.k, problem.exponents)]
        for _ in range(2):  # the second time with the memory of the first
            found = ops.topk_mask(
                problem.scores,
                problem.k,
                exponents=problem.exponents,
                absolute=problem.absolute,
                masks=[
                    None if m is None else torch.from_numpy(np.packbits(m, bitorder="little"))
                    for m in kept
                ],
                memory=memory,
            )
            assert as_bytes(found) == wanted, describe(problem)

    for_seeds(MEMORY_CASES, "memory", check)


def test_topk_mask_reference_equals_lexsort() -> None:
    def check(generator: np.random.Generator) -> None:
        problem = random_problem(generator, "small")
        with registry.using("reference"):
            assert as_bytes(problem.packed()) == problem.expected(), describe(problem)

    for_seeds(REFERENCE_CASES, "reference", check)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_topk_mask_equals_lexsort_in_100_000_cases(group: str) -> None:
    def check(generator: np.random.Generator) -> None:
        problem = random_problem(generator, group)
        assert as_bytes(problem.packed()) == problem.expected(), describe(problem)

    for_seeds(5 * CASES[group], f"many {group}", check)


def test_kth_largest_equals_lexsort() -> None:
    def check(generator: np.random.Generator) -> None:
        group = ("small", "border")[generator.integers(2)]
        scores = random_problem(generator, group).scores
        flat = [s.double().reshape(-1).numpy() for s in scores]
        values = np.concatenate(flat)
        if values.size == 0:
            return
        k = max(1, random_count(generator, values.size))
        wanted = float(values[np.lexsort((-values,))[k - 1]])
        assert ops.kth_largest(scores, k) == wanted

    for_seeds(KTH_CASES, "kth", check)


def test_topk_mask_refuses_nan_wherever_it_is() -> None:
    """The first tensor that holds NaN is named, whatever its sign, k and the other tensors."""

    def check(generator: np.random.Generator) -> None:
        group = ("small", "border")[generator.integers(2)]
        problem = random_problem(generator, group)
        filled = [i for i, s in enumerate(problem.scores) if s.numel()]
        if not filled:
            return
        bad = sorted(generator.choice(filled, generator.integers(1, 3)).tolist())
        scores = list(problem.scores)
        for index in bad:
            spoilt = scores[index].clone()  # expanded tensors get memory of their own
            at = np.unravel_index(generator.integers(spoilt.numel()), spoilt.shape)
            spoilt[tuple(map(int, at))] = math.nan if generator.random() < 0.5 else -math.nan
            scores[index] = spoilt
        names = [f"layer{i}.weight" for i in range(len(scores))]
        with pytest.raises(NonFiniteScoreError, match=rf"layer{bad[0]}\.weight hold NaN"):
            ops.topk_mask(
                scores,
                problem.k,
                exponents=problem.exponents,
                absolute=problem.absolute,
                names=names,
            )

    for_seeds(NAN_CASES, "nan", check)


@dataclass(frozen=True)
class Layer:
    weight: Tensor
    a: Tensor
    g: Tensor
    candidates: np.ndarray | None

    def packed_candidates(self) -> Tensor | None:
        if self.candidates is None:
            return None
        return torch.from_numpy(np.packbits(self.candidates, bitorder="little"))

    def scores(self, power: int) -> np.ndarray:
        """By the definition: float32, the products in this order; what is no candidate is last."""
        weight = self.weight.float().numpy()
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            powered = np.abs(weight) if power == 1 else weight * weight
            scores = (powered * self.a.numpy()) * self.g.numpy()[:, None]
        if self.candidates is not None:
            scores = np.where(self.candidates.reshape(scores.shape), scores, -np.inf)
        return scores


FACTORED_SIDES = {
    "small": (0, 1, 3, 7, 8, 12, 33),
    "border": (31, 64, 67),
    "large": (255, 256, 513),
}


def random_layer(generator: np.random.Generator, sides: tuple[int, ...]) -> Layer:
    rows, columns = generator.choice(sides, 2).tolist()
    size = rows * columns
    kind = ALL_KINDS[generator.integers(len(ALL_KINDS))]
    values = make_scores(
        generator, size, kind, DTYPES[generator.integers(3)], "contiguous"
    ).reshape(rows, columns)
    layout = generator.integers(3)
    if layout == 1:
        values = values.T.contiguous().T
    elif layout == 2:
        spread = torch.full((rows, 2 * columns + 1), math.nan, dtype=values.dtype)
        spread[:, 1::2] = values
        values = spread[:, 1::2]
    scale = generator.choice([0.0, 1e-30, 1.0, 1.0, 1e20])
    a = torch.from_numpy((generator.random(columns) * scale).astype(np.float32))
    g = torch.from_numpy(np.round(generator.random(rows), 1).astype(np.float32))
    candidates = generator.random(size) < 0.5 if generator.random() < 0.4 else None
    return Layer(values, a, g, candidates)


@pytest.mark.parametrize("group", FACTORED_CASES)
def test_topk_mask_factored_equals_lexsort(group: str) -> None:
    refused = [0]

    def check(generator: np.random.Generator) -> None:
        layers = [
            random_layer(generator, FACTORED_SIDES[group]) for _ in range(generator.integers(1, 5))
        ]
        power = int(generator.integers(1, 3))
        scores = [layer.scores(power) for layer in layers]
        exponents = generator.integers(-300, 301, len(layers)).tolist()
        k: int | list[int]
        if generator.random() < 0.6:
            k = random_count(generator, sum(s.size for s in scores))
        else:
            k = [random_count(generator, s.size) for s in scores]

        def found() -> list[Tensor]:
            return ops.topk_mask_factored(
                [layer.weight for layer in layers],
                [layer.a for layer in layers],
                [layer.g for layer in layers],
                exponents,
                k,
                power=power,
                masks=[layer.packed_candidates() for layer in layers],
                names=[f"layer{i}.weight" for i in range(len(layers))],
            )

        nan = [i for i, s in enumerate(scores) if np.isnan(s).any()]  # infinity times 0
        if nan:
            refused[0] += 1
            with pytest.raises(NonFiniteScoreError, match=rf"layer{nan[0]}\.weight hold NaN"):
                found()
            return
        kept = lexsort_kept([torch.from_numpy(s) for s in scores], k, exponents)
        assert as_bytes(found()) == [packed_bytes(part) for part in kept]

    for_seeds(FACTORED_CASES[group], f"factored {group}", check)
    assert 0 < refused[0] < FACTORED_CASES[group] / 2


#: Problems of each group that are solved under every instruction set and number of threads.
FIXED = {"small": 60, "crowd": 20, "border": 80, "large": 100, "million": 16}


def fixed_problems() -> Iterator[Problem]:
    for group, count in FIXED.items():
        for seed in range(count):
            generator = np.random.default_rng([RUN, *b"fixed", *group.encode(), seed])
            yield random_problem(generator, group)


def digest(problems: list[Problem], threads: int) -> str:
    """sha256 over the masks of all problems."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = hashlib.sha256()
    try:
        for problem in problems:
            for bits in problem.packed():
                found.update(bits.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    return found.hexdigest()


CODE = """
from paikern.backends import cpu
from python_tests.ops.test_selection_many import digest, fixed_problems
problems = list(fixed_problems())
print(cpu.isa(), *(digest(problems, threads) for threads in (1, 2, 3)))
"""


@pytest.fixture(scope="module")
def expected_digest() -> str:
    found = hashlib.sha256()
    for problem in fixed_problems():
        for packed in problem.expected():
            found.update(packed)
    return found.hexdigest()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets_and_threads_give_the_masks_of_lexsort(
    isa: str, expected_digest: str
) -> None:
    environment = {**os.environ, "PAIKERN_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ran, *digests = done.stdout.split()
    if ran != isa:
        pytest.skip(f"this CPU has no {isa}: ran {ran}")
    assert digests == [expected_digest] * 3


def test_100_reruns_give_the_same_masks() -> None:
    """With two threads, among them problems that are large and full of ties."""
    problems = [
        random_problem(np.random.default_rng([RUN, *b"rerun", seed]), group)
        for group, count in (("small", 10), ("crowd", 2), ("large", 8), ("million", 2))
        for seed in range(count)
    ]
    assert len({digest(problems, threads=2) for _ in range(100)}) == 1
