"""The SynFlow family against worked examples and float64 autograd."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from paikern.errors import PaikernError, PaikernWarning, SparsityError
from paikern.scorers.synflow import log1p_scaled
from python_tests.oracles import goldens, synflow_oracle
from python_tests.oracles.synflow import flow_scores
from python_tests.scorers.helpers import (
    agreement,
    counts,
    empty,
    largest_count_difference,
    log_paths,
    synflow_float64,
)

IMAGE = torch.ones(1, 3, 32, 32)
COLLAPSE = "ignore:layer collapse:paikern.errors.PaikernWarning"

#: name of the method, its options, and the same for the oracle
FAMILY: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "synflow": ("synflow", {}, {}),
    "synflow_l2_a": ("synflow_l2", {}, {"p_net": 2, "p_score": 2}),
    "synflow_l2_b": ("synflow_l2", {"definition": "b"}, {"p_net": 1, "p_score": 2}),
    "synflow_l2_c": ("synflow_l2", {"definition": "c"}, {"p_net": 2, "p_score": 1}),
    "logsynflow": ("logsynflow", {}, {"log_score": True, "norm": "identity"}),
}


def worked_example() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        for layer, values in zip((model[0], model[2]), goldens.PATH_WEIGHTS, strict=True):
            layer.weight.copy_(torch.tensor(values))
    return model


def normed_net() -> nn.Module:
    """Convolutions with biases, norms with trained-looking statistics, a branch, a max pool."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)
            self.branch = nn.Conv2d(6, 6, 3, padding=1, groups=2)
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x)).relu()
            x = self.pool(x + self.branch(x))
            y: Tensor = self.head(x.mean((2, 3)))
            return y

    net = Net()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in net.norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(6, generator=generator))
        net.norm.running_var.abs_()
    return net


def run(model: nn.Module, method: str, x: Tensor, **options: Any) -> pk.MaskSet:
    return pk.prune(model, method, example_inputs=x, apply=False, progress=False, **options)


@pytest.mark.parametrize("name", goldens.PATH_SCORES)
def test_worked_example(name: str) -> None:
    _, _, total, *expected = goldens.PATH_SCORES[name]
    method, options, _ = FAMILY[name]
    model = worked_example()
    scores = pk.score(model, method, example_inputs=torch.ones(1, 3), **options)
    for layer, values in zip(scores, expected, strict=True):
        torch.testing.assert_close(scores.dense(layer), torch.tensor(values))
    masks = run(model, method, torch.ones(1, 3), sparsity=0.5, rounds=1, **options)
    assert masks.metadata["history"][0]["log_flow"] == pytest.approx(math.log(total), rel=1e-6)


def test_worked_example_of_the_logarithm() -> None:
    scores = pk.score(worked_example(), "logsynflow", example_inputs=torch.ones(1, 3))
    for layer, values in zip(scores, goldens.LOG_SYNFLOW, strict=True):
        torch.testing.assert_close(scores.dense(layer), torch.tensor(values), atol=5e-5, rtol=0)


@pytest.mark.parametrize("selection", ["exact", "published"])
def test_worked_example_selection(selection: str) -> None:
    model, x = worked_example(), torch.ones(1, 3)
    masks = run(model, "synflow", x, sparsity=0.6, rounds=1, selection=selection)
    scores = pk.score(model, "synflow", example_inputs=x)
    kept = torch.cat([scores.dense(n)[masks[n]] for n in masks])
    assert sorted(kept.tolist()) == goldens.SYNFLOW_KEPT_AT_60


# LogSynFlow leaves norms out, so of its published variant there is nothing to compare.
VARIANTS = [(n, v) for n in FAMILY for v in ("paper", "published") if (n[0], v[1]) != ("l", "u")]


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_scores_follow_autograd(name: str, variant: str) -> None:
    """Norm statistics, biases, groups, a residual branch and a max pool, under a mask."""
    method, options, oracle = FAMILY[name]
    model, x = normed_net(), torch.ones(1, 2, 6, 6)
    masks = pk.prune(model, "random", sparsity=0.4, apply=False)
    found = pk.score(model, method, example_inputs=x, masks=masks, variant=variant, **options)
    _, expected = flow_scores(model, x, dict(masks), variant=variant, **oracle)
    for layer, score in expected.items():
        values = torch.where(masks[layer], found.dense(layer).double(), 0.0)
        torch.testing.assert_close(values, score, rtol=2e-5, atol=1e-12)


def test_pruned_weights_rank_last_unless_not_monotone() -> None:
    model, x = worked_example(), torch.ones(1, 3)
    masks = pk.prune(model, "magnitude", sparsity=0.5, apply=False)
    for monotone, value in ((True, -1.0), (False, 0.0)):
        scores = pk.score(model, "synflow", example_inputs=x, masks=masks, monotone=monotone)
        counted = pk.select(scores, sparsity=0.5)
        assert counted == masks or not monotone
        entry = scores["0.weight"]
        dense = entry.dense(value) if isinstance(entry, pk.Factored) else entry
        assert (dense.values[~masks["0.weight"]] == value).all()


def test_masks_shrink_round_by_round() -> None:
    model, x = zoo.create("mlp", sizes=(20, 30, 10)), torch.ones(1, 20)
    for rounds in (1, 2, 3):
        masks = run(model, "synflow", x, sparsity=0.9, rounds=rounds)
        seen = [round(h["density"] * 900) for h in masks.metadata["history"]]
        assert seen == sorted(seen, reverse=True)
        assert seen[-1] == masks.kept == 90
    # A dense start with pruned weights marked: none of them may return.
    scores = pk.score(model, "synflow", example_inputs=x, masks=masks)
    again = pk.select(scores, sparsity=0.9)
    assert again == masks


@pytest.mark.parametrize("rounds", [1, 3, 10])
@pytest.mark.filterwarnings(COLLAPSE)
def test_resnet20_against_float64(rounds: int) -> None:
    model = zoo.create("resnet20", seed=rounds)
    found = run(model, "synflow", IMAGE, sparsity=0.98, rounds=rounds)
    expected = synflow_oracle(model, IMAGE, 0.98, rounds)
    assert found.kept == expected.kept[-1] == 5418
    assert agreement(found, expected.masks) >= 0.999
    assert found.metadata["history"][-1]["log_flow"] == pytest.approx(
        expected.log_totals[-1], rel=1e-5
    )


@pytest.mark.parametrize("name", [n for n in FAMILY if n != "synflow"])
@pytest.mark.filterwarnings(COLLAPSE)
def test_family_on_resnet20_against_float64(name: str) -> None:
    method, options, oracle = FAMILY[name]
    model = zoo.create("resnet20", seed=1)
    found = run(model, method, IMAGE, sparsity=0.9, rounds=3, **options)
    expected = synflow_oracle(model, IMAGE, 0.9, 3, **oracle)
    assert found.kept == 27_090
    assert agreement(found, expected.masks) >= 0.999


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
@pytest.mark.filterwarnings(COLLAPSE)
def test_published_variant_against_float64(schedule: str) -> None:
    model = zoo.create("resnet20", seed=2)
    options = {"sparsity": 0.9, "rounds": 3, "variant": "published", "schedule": schedule}
    found = run(model, "synflow", IMAGE, **options)
    expected = synflow_oracle(model, IMAGE, 0.9, 3, variant="published", schedule=schedule)
    assert agreement(found, expected.masks) >= 0.999


def assert_long_run_agrees(
    model: nn.Module, found: pk.MaskSet, expected: dict[str, Tensor], x: Tensor, kept: int
) -> None:
    """One rounding flip grows over a hundred rounds, so sets are compared by counts and paths."""
    assert found.kept == sum(counts(expected).values()) == kept
    assert largest_count_difference(found, expected) <= 0.02
    assert empty(found) == empty(expected)
    assert log_paths(model, found, x) == pytest.approx(log_paths(model, expected, x), rel=0.01)


@pytest.mark.filterwarnings(COLLAPSE)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_hundred_rounds_on_resnet20(seed: int) -> None:
    model = zoo.create("resnet20", seed=seed)
    found = run(model, "synflow", IMAGE, sparsity=0.98)
    assert len(found.metadata["history"]) == 100
    assert_long_run_agrees(model, found, synflow_float64(model, IMAGE, 0.98, 100), IMAGE, 5418)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 10])
def test_vgg16_against_float64(rounds: int) -> None:
    model = zoo.create("vgg16_bn", seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PaikernWarning)
        found = run(model, "synflow", IMAGE, sparsity=0.98, rounds=rounds)
    expected = synflow_float64(model, IMAGE, 0.98, rounds)
    assert found.kept == sum(counts(expected).values()) == 295_234
    assert agreement(found, expected) >= 0.999


@pytest.mark.slow
def test_hundred_rounds_on_vgg16() -> None:
    model = zoo.create("vgg16_bn", seed=0)
    found = run(model, "synflow", IMAGE, sparsity=0.98)
    expected = synflow_float64(model, IMAGE, 0.98, 100)
    assert_long_run_agrees(model, found, expected, IMAGE, 295_234)


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [10, 100])
def test_resnet50_at_224(rounds: int) -> None:
    """A total near 4e72: far beyond float32, and nothing special."""
    model, x = zoo.create("resnet50", seed=0), torch.ones(1, 3, 224, 224)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(model, "synflow", x, sparsity=0.8, rounds=rounds)
    assert found.kept == 5_100_583
    assert all(math.isfinite(h["log_flow"]) for h in found.metadata["history"])
    assert found.metadata["history"][0]["log_flow"] / math.log(10) > 70
    expected = synflow_float64(model, x, 0.8, rounds)
    assert set(empty(found)) <= set(empty(expected))
    named = " ".join(str(w.message) for w in caught if w.category is PaikernWarning)
    assert all(name in named for name in empty(found))
    assert largest_count_difference(found, expected) <= 0.02
    if empty(found):
        floored = run(model, "synflow", x, sparsity=0.8, rounds=rounds, on_collapse="floor")
        assert floored.kept == 5_100_583
        assert not empty(floored)
        with pytest.raises(SparsityError, match=rf"layer collapse: .*{empty(found)[-1]}"):
            run(model, "synflow", x, sparsity=0.8, rounds=rounds, on_collapse="raise")


@pytest.mark.slow
def test_resnet50_scores_are_finite_and_rank_as_in_float64() -> None:
    model, x = zoo.create("resnet50", seed=0), torch.ones(1, 3, 224, 224)
    found = pk.score(model, "synflow", example_inputs=x)
    _, expected = flow_scores(model, x)
    for name, score in expected.items():
        torch.testing.assert_close(
            found.dense(name, torch.float64), score, rtol=1e-4, atol=float(score.max()) * 1e-9
        )


def deep_mlp(depth: int) -> nn.Module:
    layers = [m for _ in range(depth) for m in (nn.Linear(16, 16, bias=False), nn.ReLU())]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_totals_far_beyond_float_range(scale: float) -> None:
    """exp(+-2800): outside of float64 as well. The masks are those of the unscaled network."""
    model, x = deep_mlp(40), torch.ones(1, 16)
    expected = run(model, "synflow", x, sparsity=0.9, rounds=5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    for selection in ("exact", "published"):
        found = run(model, "synflow", x, sparsity=0.9, rounds=5, selection=selection)
        assert agreement(found, expected) > 0.9999
        assert found.kept == expected.kept or selection == "published"
    assert math.isfinite(found.metadata["history"][-1]["log_flow"])


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    power=st.sampled_from(["synflow", "synflow_l2"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_every_layer_of_a_chain_holds_the_whole_flow(
    sizes: list[int], power: str, seed: int
) -> None:
    model = zoo.create("mlp", sizes=sizes, seed=seed)
    scores = pk.score(model, power, example_inputs=torch.ones(1, sizes[0]))
    sums = [float(scores.dense(n, torch.float64).sum()) for n in scores]
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-5)


def test_lamp_budgets_do_not_count_pruned_weights() -> None:
    """The mark of a pruned weight is negative and must not enter a square."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    x = torch.ones(1, 1, 4, 4)
    masks = run(model, "synflow", x, sparsity=0.8, rounds=4, scope="lamp")
    assert masks.kept == pk.budget.keep_count(masks.total, 0.8)
    expected = synflow_oracle(model, x, 0.5, 1)
    state = pk.MaskSet.from_bool(expected.masks)
    scores = pk.score(model, "synflow", example_inputs=x, masks=state)
    _, reference = flow_scores(model, x, expected.masks)
    found = pk.select(scores, sparsity=0.8, scope="lamp")
    want = pk.budget.layer_budget(reference_shapes(reference), 0.8, "lamp", scores=reference)
    assert list(found.kept_by_layer.values()) == want


def reference_shapes(scores: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(score.shape) for name, score in scores.items()}


def test_norms_of_zeros_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Flatten())
    nn.init.zeros_(model[1].weight)
    x = torch.ones(1, 1, 6, 6)
    with pytest.raises(PaikernError, match=r"none gets past 2.weight.*, so .* norm='identity'"):
        run(model, "synflow", x, sparsity=0.5)
    assert run(model, "synflow", x, sparsity=0.5, norm="identity").kept == 27

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = model, nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x.flatten(1)[:, :8] + self.inner(x))
            return y

    with pytest.warns(PaikernWarning, match="norms of zeros .* inner.1; norm='identity'"):
        run(Residual(), "synflow", x, sparsity=0.1, rounds=1)


def test_layer_without_paths_is_noted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 8), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    with (
        pytest.warns(PaikernWarning, match="layer collapse: unused.weight"),
        pytest.warns(PaikernWarning, match="no path .* uses unused.weight"),
    ):
        masks = run(Net(), "synflow", torch.ones(1, 3), sparsity=0.5, rounds=2)
    assert masks.kept_by_layer == {"used.weight": 15, "unused.weight": 0}


def test_tied_weights_sum_their_scores() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    model, x = Tied(), torch.ones(1, 4)
    masks = run(model, "synflow", x, sparsity=0.5, rounds=4)
    expected = synflow_oracle(model, x, 0.5, 4)
    assert list(masks) == ["a.weight"]
    assert torch.equal(masks["a.weight"], expected.masks["a.weight"])
    with pytest.raises(PaikernError, match=r"logsynflow: a\.weight is used more than once"):
        pk.score(model, "logsynflow", example_inputs=x)


def test_log1p_of_any_exponent() -> None:
    x = torch.tensor([0.0, 1.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(log1p_scaled(x, 3), torch.log1p(x * 8))
    huge = log1p_scaled(x, 5000)
    assert huge.tolist() == pytest.approx(
        [0.0, 5000 * math.log(2), math.log(1.5) + 5000 * math.log(2)]
    )
    assert log1p_scaled(x, -5000).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("synflow", {"norm": "batch"}, "norm must be 'scale' or 'identity', got 'batch'"),
        ("synflow_l2", {"definition": "d"}, "definition must be 'a', 'b' or 'c', got 'd'"),
        ("synflow", {"definition": "a"}, "definition: method 'synflow' has no such option"),
    ],
)
def test_bad_options(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(worked_example(), method, torch.ones(1, 3), sparsity=0.5, **options)


@pytest.mark.parametrize("method", ["synflow", "synflow_l2"])
def test_float64_weights_beside_small_maps(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 40, 3, padding=1), nn.Flatten(),
        nn.Linear(2560, 10),
    )  # fmt: skip
    options = {"sparsity": 0.5, "apply": False, "progress": False, "rounds": 1}
    x = torch.ones(1, 3, 8, 8)
    single = pk.prune(model, method, example_inputs=x, **options)
    double = pk.prune(model.double(), method, example_inputs=x.double(), **options)
    assert double.kept == single.kept
    assert agreement(double, single) > 0.9999
