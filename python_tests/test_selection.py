"""From scores to masks: exact counts, ties, the published rule, collapsed layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import paikern as pk
from bench.references.selection import select_global
from paikern.errors import NonFiniteScoreError, PaikernWarning, SparsityError
from paikern.scores import Dense, Factored, Scores
from paikern.selection import empty_layers, select_packed

Values = dict[str, list[float]]


def scores_of(values: Values) -> Scores:
    entries = {name: Dense(torch.tensor(v, dtype=torch.float32)) for name, v in values.items()}
    return Scores(entries, {name: (len(v),) for name, v in values.items()})


def kept(masks: pk.MaskSet) -> dict[str, list[int]]:
    return {name: torch.nonzero(mask).flatten().tolist() for name, mask in masks.items()}


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=12), min_size=1, max_size=4),
    st.floats(0, 0.99),
)
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("rule", ["exact", "published"])
def test_against_a_full_sort(rule: str, layers: list[list[int]], sparsity: float) -> None:
    """Many ties: "exact" keeps k with the lowest indices, "published" drops all of them."""
    values = {str(i): [float(v) for v in layer] for i, layer in enumerate(layers)}
    scores = scores_of(values)
    k = pk.budget.keep_count(scores.total, sparsity)
    expected = select_global({n: scores.dense(n) for n in scores}, scores.total - k, rule)
    if not any(bool(m.any()) for m in expected.values()):
        with pytest.raises(SparsityError, match="prunes every weight"):
            select_packed(scores, k, rule)
        return
    found = pk.MaskSet(select_packed(scores, k, rule), scores.shapes)
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert found.kept == k or (rule == "published" and found.kept <= k)


def test_published_rule_prunes_all_ties_at_the_threshold() -> None:
    scores = scores_of({"a": [3.0, 1.0, 1.0], "b": [1.0, 2.0]})
    exact = pk.select(scores, sparsity=0.4)
    assert kept(exact) == {"a": [0, 1], "b": [1]}
    published = pk.select(scores, sparsity=0.4, rule="published")
    assert kept(published) == {"a": [0], "b": [1]}
    assert kept(pk.select(scores, sparsity=0.1, rule="published"))["a"] == [0, 1, 2]


def test_published_rule_keeps_nan_and_says_so() -> None:
    scores = scores_of({"a": [1.0, math.nan, 3.0, 2.0]})
    with pytest.raises(NonFiniteScoreError, match="a"):
        pk.select(scores, sparsity=0.5)
    with pytest.warns(PaikernWarning, match="keeps NaN scores, .*: a"):
        masks = pk.select(scores, sparsity=0.5, rule="published")
    assert kept(masks)["a"] == [1, 2]


def test_a_number_for_each_layer() -> None:
    scores = scores_of({"a": [3.0, 1.0, 2.0], "b": [9.0, 8.0]})
    for rule in ("exact", "published"):
        found = pk.MaskSet(select_packed(scores, [2, 1], rule), scores.shapes)
        assert kept(found) == {"a": [0, 2], "b": [0]}


@pytest.mark.parametrize("scope", ["local", "uniform", "erk", "lamp"])
def test_scopes_follow_their_budgets(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 30), "b": (20, 40), "c": (10, 20)}
    values = {n: torch.rand(s, generator=generator) for n, s in shapes.items()}
    scores = Scores({n: Dense(v) for n, v in values.items()}, shapes)
    masks = pk.select(scores, sparsity=0.8, scope=scope)
    expected = pk.budget.layer_budget(shapes, 0.8, scope, scores=values)
    assert list(masks.kept_by_layer.values()) == expected
    for name, count in masks.kept_by_layer.items():  # the best of each layer
        best = values[name].flatten().argsort(descending=True, stable=True)[:count]
        assert masks[name].flatten()[best].all()


COLLAPSING: Values = {"big": [9.0, 8.0, 7.0, 6.0], "small": [0.1, 0.3, 0.2], "tiny": [0.01]}


def test_collapse_is_named() -> None:
    with pytest.warns(PaikernWarning, match="layer collapse: small, tiny keep no weight; use more"):
        masks = pk.select(scores_of(COLLAPSING), sparsity=0.5)
    assert kept(masks) == {"big": [0, 1, 2, 3], "small": [], "tiny": []}


def test_collapse_raises() -> None:
    with pytest.raises(SparsityError, match="layer collapse: small, tiny would keep no weight"):
        pk.select(scores_of(COLLAPSING), sparsity=0.5, on_collapse="raise")


def test_floor_takes_from_the_globally_weakest() -> None:
    masks = pk.select(scores_of(COLLAPSING), sparsity=0.5, on_collapse="floor")
    assert kept(masks) == {"big": [0, 1], "small": [1], "tiny": [0]}


def test_floor_keeps_layers_that_its_own_gifts_would_empty() -> None:
    """Giving to `tiny` takes the only weight of `small`, which then needs one itself."""
    values: Values = {"big": [9.0, 8.0, 7.0], "small": [0.3, 0.2], "tiny": [0.01]}
    masks = pk.select(scores_of(values), sparsity=1 / 3, on_collapse="floor")
    assert kept(masks) == {"big": [0, 1], "small": [0], "tiny": [0]}


def test_floor_needs_a_weight_for_each_layer() -> None:
    scores = scores_of({"a": [3.0], "b": [2.0], "c": [1.0]})
    with pytest.raises(SparsityError, match=r"each of 2 layers, but only 1 are kept"):
        pk.select(scores, sparsity=0.7, on_collapse="floor")


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9), min_size=2, max_size=5),
    st.floats(0, 0.9),
)
@settings(max_examples=60, deadline=None)
def test_floor_is_exact_and_leaves_nothing_empty(
    layers: list[list[float]], sparsity: float
) -> None:
    scores = scores_of({str(i): layer for i, layer in enumerate(layers)})
    k = pk.budget.keep_count(scores.total, sparsity)
    if k < len(layers):
        return
    masks = pk.select(scores, sparsity=sparsity, on_collapse="floor")
    assert masks.kept == k
    assert min(masks.kept_by_layer.values()) >= 1


def test_empty_layers() -> None:
    packed = {
        "a": torch.tensor([0, 0], dtype=torch.uint8),
        "b": torch.tensor([0, 4], dtype=torch.uint8),
        "none": torch.empty(0, dtype=torch.uint8),
    }
    assert empty_layers(packed) == ["a"]


def test_tensors_without_weights_are_allowed() -> None:
    scores = scores_of({"a": [], "b": [2.0, 1.0]})
    assert kept(pk.select(scores, sparsity=0.5)) == {"a": [], "b": [0]}


@pytest.mark.parametrize("absolute", [True, False])
def test_factored_beside_dense_keeps_its_pruned_weights_last(absolute: bool) -> None:
    """Scores 9, 1, 4, 2 with the 9 pruned, beside 3 and 0.5 (magnitudes where asked for)."""
    weight, ones = torch.tensor([[9.0, 1.0], [4.0, 2.0]]), torch.ones(2)
    mask = pk.ops.pack_mask(torch.tensor([[False, True], [True, True]]))
    dense = torch.tensor([-3.0, 0.5]) if absolute else torch.tensor([3.0, 0.5])
    scores = Scores(
        {
            "factored": Factored(weight, 1, ones, ones, mask=mask),
            "dense": Dense(dense, absolute=absolute),
            "signed": Dense(torch.tensor([-7.0, 0.25])),
        },
        {"factored": (2, 2), "dense": (2,), "signed": (2,)},
    )
    order = ["factored 2", "dense 0", "factored 3", "factored 1", "dense 1", "signed 1", "signed 0"]
    for k in range(1, len(order) + 1):
        packed = select_packed(scores, k)
        found = {
            f"{name} {i}"
            for name, bits in packed.items()
            for i in torch.nonzero(pk.ops.unpack_mask(bits, (math.prod(scores.shapes[name]),)))
            .flatten()
            .tolist()
        }
        assert found == set(order[:k])


def test_select_says_where_a_published_rule_keeps_another_number() -> None:
    scores = scores_of({"a": [0.0] * 6 + [1.0, 2.0]})
    with pytest.warns(PaikernWarning, match="keeps 2 weights where 6 were asked for"):
        pk.select(scores, sparsity=0.25, rule="published")
