"""A plan is a fixed sequence of launches over device memory, as a CUDA graph needs it."""

from __future__ import annotations

import pytest
import torch

from paikern import ops
from paikern.backends.cuda_launch import provided
from paikern.backends.cuda_layers import dense, factored
from paikern.backends.cuda_select import SelectionPlan
from paikern.errors import NonFiniteScoreError
from python_tests.cuda_source import shim

pytestmark = pytest.mark.cuda_source


def test_a_plan_is_launched_again_on_other_values_and_counts(on_cpu: shim.OnCpu) -> None:
    scores = [torch.randn(30_000), torch.randn(9000)]
    k = torch.tensor([5000])
    with provided(on_cpu):
        plan = SelectionPlan(dense(scores, (), True), k)
        started = list(plan.steps)
        for count in (5000, 1, 38_999, 0, 12_345):
            k.fill_(count)
            plan.launch()
            assert all(map(torch.equal, plan.bits, ops.topk_mask(scores, count, absolute=True)))
            for tensor in scores:
                tensor.copy_(torch.randn_like(tensor).round(decimals=1))
        plan.check("plan")
    assert plan.steps == started


def test_exponents_are_read_when_it_runs(on_cpu: shim.OnCpu) -> None:
    weights = [torch.randn(40, 50), torch.randn(30, 90)]
    a, g = [torch.rand(50), torch.rand(90)], [torch.rand(40), torch.rand(30)]
    exponents = torch.tensor([0, 0])
    with provided(on_cpu):
        plan = SelectionPlan(factored(weights, a, g, (), 1, ()), [777], exponents)
        for values in ([0, 0], [2, -1], [-1000, 1000], [499_999, -500_000]):
            exponents.copy_(torch.tensor(values))
            plan.launch()
            wanted = ops.topk_mask_factored(weights, a, g, values, 777)
            assert all(map(torch.equal, plan.bits, wanted)), values


def test_nan_of_any_launch_is_told_at_the_end(on_cpu: shim.OnCpu) -> None:
    scores = torch.randn(1000)
    with provided(on_cpu):
        plan = SelectionPlan(dense([torch.randn(10), scores], (), False), [100])
        scores[5] = torch.nan
        plan.launch()
        scores[5] = 0.0
        plan.launch()
        with pytest.raises(NonFiniteScoreError, match=r"loop: scores\[1\]"):
            plan.check("loop")


def test_counters_are_back_where_they_began(on_cpu: shim.OnCpu) -> None:
    """Whatever way a selection went: the next launch relies on it."""
    cases = (torch.randn(50_000), torch.randint(0, 2, (200_000,)).float(), torch.randn(100))
    with provided(on_cpu):
        for scores in cases:
            plan = SelectionPlan(dense([scores], (), False), [scores.numel() // 3])
            plan.launch()
            state, bins = plan._states[:16], plan._states[16:-1]
            assert int(state[11]) == 0
            assert not bins.any()


def test_the_band_holds_on_ordinary_scores_and_is_left_on_misleading_ones(
    on_cpu: shim.OnCpu,
) -> None:
    collected, everything = 0, 1
    with provided(on_cpu):
        plan = SelectionPlan(dense([torch.randn(300_000)], (), False), [30_000])
        plan.launch()
        assert int(plan._states[4]) == collected
        assert 0 < int(plan._states[3]) < 300_000 // 16  # a few percent
        plan = SelectionPlan(dense([torch.randint(0, 2, (300_000,)).float()], (), False), [30_000])
        plan.launch()
        assert int(plan._states[4]) == everything
