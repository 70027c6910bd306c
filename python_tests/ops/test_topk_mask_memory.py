"""`memory=`: where the threshold was tells where to look, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paikern import ops
from paikern.backends import registry


def fresh(rankings: int) -> torch.Tensor:
    return torch.full((rankings, 2), math.nan, dtype=torch.float64)


def drifting(seed: int, sizes: list[int], rounds: int, step: float, dtype: torch.dtype):
    """Scores that move a little every round, and sometimes a lot."""
    generator = np.random.default_rng(seed)
    scores = [generator.standard_normal(size) for size in sizes]
    for _ in range(rounds):
        yield [torch.from_numpy(s).to(dtype) for s in scores]
        jump = 10.0 ** generator.integers(-3, 4) if generator.random() < 0.2 else 1.0
        scores = [jump * (s + step * generator.standard_normal(s.size)) for s in scores]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(
        st.sampled_from([0, 1, 33, 511, 513, 3000, 9216, 70_000]), min_size=1, max_size=4
    ),
    step=st.sampled_from([0.0, 1e-3, 0.3]),
    keep=st.floats(0, 1),
    each=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_masks_do_not_depend_on_memory(seed, sizes, step, keep, each, dtype) -> None:
    k = [int(keep * n) for n in sizes] if each else int(keep * sum(sizes))
    memory = fresh(len(sizes) if each else 1)
    for scores in drifting(seed, sizes, 6, step, dtype):
        plain = ops.topk_mask(scores, k, absolute=True)
        remembered = ops.topk_mask(scores, k, absolute=True, memory=memory)
        assert all(torch.equal(a, b) for a, b in zip(plain, remembered, strict=True))


def test_memory_holds_the_threshold_and_its_move() -> None:
    memory = fresh(1)
    first = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    for scores in (first, first + 0.25, first + 0.75):
        ops.topk_mask(scores, 700, memory=memory)
        assert memory[0, 0].item() == ops.kth_largest(scores, 700)
    assert memory[0, 1].item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 1e30, -1e30, math.inf, 5e-324])
@pytest.mark.parametrize("move", [0.0, 1e-30, 1e30, math.inf, math.nan])
def test_a_wrong_memory_is_found_out(threshold: float, move: float) -> None:
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(2))
    memory = torch.tensor([[threshold, move]], dtype=torch.float64)
    assert torch.equal(
        ops.topk_mask(scores, 1234, memory=memory)[0], ops.topk_mask(scores, 1234)[0]
    )


def test_exponents_leave_memory_alone() -> None:
    scores = [torch.rand(3000), torch.rand(2000)]
    memory = fresh(1)
    ops.topk_mask(scores, 100, exponents=[0, 40], memory=memory)
    assert memory.isnan().all()


@pytest.mark.parametrize(
    "memory", [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(1, 2), torch.zeros(2)]
)
def test_another_shape_is_refused(memory: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"topk_mask: memory must be .* \(1, 2\)"):
        ops.topk_mask(torch.rand(9), 3, memory=memory)


def test_the_reference_takes_memory() -> None:
    memory = fresh(1)
    scores = torch.rand(100)
    with registry.using("reference"):
        reference = ops.topk_mask(scores, 9, memory=memory)
    assert torch.equal(reference[0], ops.topk_mask(scores, 9)[0])
