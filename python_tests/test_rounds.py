"""Rounds: exactly what the schedule says is kept after each, and nothing pruned returns."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paikern as pk
from paikern import ops, rounds

pytestmark = [
    pytest.mark.filterwarnings("ignore:layer collapse"),
    pytest.mark.filterwarnings("ignore:.*scores carry no information"),
]

#: Scored from the gradients or weights of what is left; FORCE lets weights return on purpose.
MONOTONE = ("itersnip", "grasp_it", "grasp", "crop", "snip", "magnitude", "wanda")


def recorded(patch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The masks of each round from now on, as bools."""
    found: list[dict[str, Tensor]] = []
    select = rounds.Plan.select

    def noted(self: rounds.Plan, scores: Any, *rest: Any) -> dict[str, Tensor]:
        packed = select(self, scores, *rest)
        found.append({n: ops.unpack_mask(bits, scores.shapes[n]) for n, bits in packed.items()})
        return packed

    patch.setattr(rounds.Plan, "select", noted)
    return found


def run(method: str, sizes: tuple[int, ...], zeros: float = 0.0, **options: Any) -> pk.MaskSet:
    """On an MLP in which a fraction of the weights is 0, so that scores tie."""
    net = pk.zoo.create("mlp", sizes=sizes, seed=0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(
                torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > zeros
            )
    generator = torch.Generator().manual_seed(2)
    data = (torch.randn(12, sizes[0], generator=generator), torch.arange(12) % sizes[-1])
    return pk.prune(net, method, data=data, apply=False, progress=False, **options)


def kept(masks: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("method", MONOTONE)
def test_nothing_returns_where_a_budget_of_erk_would_grow(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer of 3-3-4-3 would go from 1 weight to 2 between rounds 9 and 10."""
    densities = pk.budget.schedule_densities(0.1, 10)
    shapes = [(3, 3), (4, 3), (3, 4)]
    budgets = [pk.budget.layer_budget(shapes, 1 - d, "erk") for d in densities]
    assert (budgets[8][0], budgets[9][0]) == (1, 2)
    seen = recorded(monkeypatch)
    masks = run(method, (3, 3, 4, 3), sparsity=0.9, rounds=10, scope="erk", schedule="exponential")
    assert len(seen) == 10
    for before, after in itertools.pairwise(seen):
        assert not any(bool((after[n] & ~before[n]).any()) for n in after)
    assert [kept(m) for m in seen] == [sum(b) for b in budgets]
    assert list(masks.kept_by_layer.values()) == budgets[9]


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(MONOTONE[:5]),
    sizes=st.lists(st.integers(2, 8), min_size=2, max_size=4).map(tuple),
    sparsity=st.floats(0.1, 0.95),
    count=st.integers(1, 8),
    scope=st.sampled_from(["global", "local", "erk"]),
    schedule=st.sampled_from(["exponential", "linear", "cubic", "expinv", "halving"]),
    zeros=st.sampled_from([0.0, 0.5]),
)
def test_every_round_keeps_its_count(
    method: str, sizes: tuple[int, ...], sparsity: float, count: int, scope: str, schedule: str,
    zeros: float,
) -> None:  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        found = recorded(patch)
        try:
            masks = run(
                method, sizes, zeros, sparsity=sparsity, rounds=count, scope=scope,
                schedule=schedule,
            )  # fmt: skip
        except pk.PaikernError:  # fewer weights than layers, or no curvature is left
            return
    shapes = list(masks.shapes.values())
    wanted = []
    for density in pk.budget.schedule_densities(1 - sparsity, count, schedule):
        budget = pk.budget.layer_budget(shapes, 1 - density, scope)
        wanted.append(budget if isinstance(budget, int) else sum(budget))
    budget = pk.budget.layer_budget(shapes, sparsity, scope)
    wanted[-1] = budget if isinstance(budget, int) else sum(budget)
    assert [kept(m) for m in found] == wanted
    assert [round(row["density"] * masks.total) for row in masks.metadata["history"]] == wanted
    for before, after in itertools.pairwise(found):
        assert not any(bool((after[n] & ~before[n]).any()) for n in after)


@pytest.mark.filterwarnings("ignore:selection='published' keeps")
@pytest.mark.parametrize("method", ["magnitude", "itersnip"])
def test_the_history_counts_what_a_published_rule_keeps(method: str) -> None:
    """Most scores tie at 0, which such rules keep or drop together."""
    masks = run(method, (6, 8, 4), 0.7, sparsity=0.5, selection="published")
    assert masks.kept != masks.total // 2
    assert masks.metadata["history"][-1]["density"] == masks.kept / masks.total


@pytest.mark.parametrize("method", ["snip", "itersnip", "magnitude"])
def test_a_published_rule_that_keeps_another_number_says_so(method: str) -> None:
    """Of 80 weights 24 are not 0; SNIP's rule keeps all scores of 0 where the threshold is 0."""
    told = r"selection='published' keeps (\d+) weights where 40 were asked for: scores that tie"
    with pytest.warns(pk.PaikernWarning, match=told) as warned:
        masks = run(method, (6, 8, 4), 0.7, sparsity=0.5, selection="published")
    assert masks.total == 80
    assert f"keeps {masks.kept} weights" in str(warned[0].message)
    assert (masks.kept == 80) == (method != "magnitude")


def test_a_published_rule_is_not_told_where_it_differs_by_the_threshold_alone() -> None:
    for method in ("snip", "grasp", "crop", "magnitude"):
        masks = run(method, (12, 8, 4), sparsity=0.5, selection="published")
        assert abs(masks.kept - 64) <= 1
