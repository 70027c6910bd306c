"""prune, score, select: counts, choices, what stays untouched, bad input, provenance."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from paikern.errors import (
    PaikernWarning,
    SparsityError,
)
from python_tests.scorers.helpers import agreement
from python_tests.small_runs import METHODS, TOTAL, Net, Untouched, X, net, prune

OPERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    **{
        f"prune {name}": lambda model, name=name: prune(model, name, apply=False)
        for name in METHODS
    },
    "score magnitude": lambda model: pk.score(model, "magnitude"),
    "score synflow": lambda model: pk.score(model, "synflow", example_inputs=X),
    "score published": lambda model: pk.score(
        model, "synflow", example_inputs=X, variant="published"
    ),
    "score dpai": lambda model: pk.score(model, "dpai", sparsity=0.5, steps=2, example_inputs=X),
    "analyze": lambda model: pk.analyze(model, example_inputs=X),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_model_is_untouched(operation: str) -> None:
    model = net()
    model.stem.weight.requires_grad_(False)
    guard = Untouched(model)
    OPERATIONS[operation](model)
    guard.check()


@pytest.mark.parametrize("method", METHODS)
def test_apply_zeroes_the_pruned_weights_and_nothing_else(method: str) -> None:
    model, twin = net(), net()
    masks = prune(model, method)
    states = zip(model.state_dict().items(), twin.state_dict().values(), strict=True)
    for (name, now), before in states:
        kept = masks[name] if name in masks else torch.ones_like(now, dtype=torch.bool)
        assert torch.equal(now, before * kept)
    assert masks == prune(twin, method, apply=False)
    masks.verify(model)


def test_interruption_leaves_the_model_unchanged() -> None:
    """An error in the middle of a run, here in the third of four rounds."""

    def stop(done: int, total: int, values: dict[str, float]) -> None:
        if done == 3:
            raise RuntimeError("enough")

    guard = Untouched(net())
    with pytest.raises(RuntimeError, match="enough"):
        prune(guard.model, "synflow", progress=stop)
    guard.check()


@given(st.floats(0, 0.998))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("scope", ["global", "erk", "lamp"])
def test_exact_count_at_any_sparsity(scope: str, sparsity: float) -> None:
    model = zoo.create("mlp", sizes=(30, 40, 10), seed=0)
    options: dict[str, Any] = {"scope": scope, "on_collapse": "floor", "apply": False}
    masks = pk.prune(model, "magnitude", sparsity=sparsity, **options)
    assert masks.kept == 1600 - math.floor(sparsity * 1600)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_exact_count_of_every_method(method: str, sparsity: float) -> None:
    masks = prune(net(), method, sparsity=sparsity, on_collapse="floor", apply=False)
    assert masks.kept == pk.budget.keep_count(TOTAL, sparsity)
    assert masks.metadata["sparsity"] == sparsity


@pytest.mark.parametrize(
    "amount", [{"density": 0.25}, {"amount": 0.75}, {"compression": 4}, {"amount": 516}]
)
def test_other_ways_to_say_how_many(amount: dict[str, float]) -> None:
    expected = prune(net(), "magnitude", sparsity=0.75, apply=False)
    assert pk.prune(net(), "magnitude", apply=False, **amount) == expected
    if amount != {"amount": 516}:
        scores = pk.score(net(), "magnitude")
        assert pk.select(scores, **amount) == expected


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_keeps_everything_and_runs_nothing(method: str) -> None:
    model = net()
    guard = Untouched(model)
    masks = prune(model, method, sparsity=0.0, apply=False)
    assert masks.kept == masks.total == TOTAL
    assert masks.metadata["history"] == []
    guard.check()


def test_scopes() -> None:
    shapes = prune(net(), "random", sparsity=0.0).shapes
    for scope in ("local", "erk"):
        for method in ("magnitude", "synflow", "dpai"):
            masks = prune(net(), method, sparsity=0.7, scope=scope, apply=False)
            expected = pk.budget.layer_budget(shapes, 0.7, scope)
            assert list(masks.kept_by_layer.values()) == expected
    lamp = prune(net(), "magnitude", sparsity=0.7, scope="lamp", apply=False)
    weights = {n: net().state_dict()[n] for n in shapes}
    assert list(lamp.kept_by_layer.values()) == pk.budget.layer_budget(
        shapes, 0.7, "lamp", scores=weights
    )
    with pytest.raises(ValueError, match="unknown scope 'globl'; did you mean 'global'"):
        prune(net(), "magnitude", scope="globl")


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic", "expinv"])
def test_schedules(schedule: str) -> None:
    masks = prune(net(), "synflow", sparsity=0.8, rounds=5, schedule=schedule, apply=False)
    densities = [h["density"] for h in masks.metadata["history"]]
    expected = pk.budget.schedule_densities(0.2, 5, schedule)
    assert densities == pytest.approx(expected, abs=1.01 / TOTAL)
    assert densities[-1] == masks.kept / TOTAL == pk.budget.keep_count(TOTAL, 0.8) / TOTAL


def test_ignore_and_include() -> None:
    def names(**options: Any) -> list[str]:
        return list(prune(net(), "synflow", apply=False, **options))

    assert names() == ["stem.weight", "body.weight", "head.weight"]
    assert names(ignore=["head"]) == ["stem.weight", "body.weight"]
    assert names(ignore=[r"re:.*e.*\.weight"]) == ["body.weight"]
    assert names(ignore=[nn.Linear]) == ["stem.weight", "body.weight"]
    assert names(include=[nn.Conv2d], ignore="stem") == ["body.weight"]
    masks = prune(net(), "synflow", ignore=["head"], sparsity=0.75, apply=False)
    assert masks.kept == pk.budget.keep_count(648, 0.75)
    model = net()
    prune(model, "magnitude", ignore=["head"], sparsity=0.75)
    assert bool((model.head.weight != 0).all())


def test_published_selection_prunes_all_ties() -> None:
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 1.0, 1.0, 3.0]]))
    assert prune(model, "magnitude", apply=False, sparsity=0.25).kept == 3
    published = prune(model, "magnitude", apply=False, sparsity=0.25, selection="published")
    assert published["weight"].tolist() == [[True, False, False, True]]


class Lopsided(nn.Module):
    """Magnitude keeps the first layer and nothing of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
        with torch.no_grad():
            for i, layer in enumerate(self.layers):
                layer.weight.mul_(10.0 ** (-4 * i)).add_(10.0 ** (-4 * i))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def test_collapse() -> None:
    options: dict[str, Any] = {"sparsity": 0.8, "apply": False}
    with pytest.warns(PaikernWarning, match=r"layers\.1\.weight, layers\.2\.weight keep no") as w:
        masks = pk.prune(Lopsided(), "magnitude", **options)
    assert w[0].filename == __file__
    assert list(masks.kept_by_layer.values()) == [22, 0, 0]
    guard = Untouched(Lopsided())
    with pytest.raises(SparsityError, match=r"layers\.1\.weight, layers\.2\.weight would keep no"):
        pk.prune(guard.model, "magnitude", sparsity=0.8, on_collapse="raise")
    guard.check()
    floor = pk.prune(Lopsided(), "magnitude", on_collapse="floor", **options)
    assert list(floor.kept_by_layer.values()) == [20, 1, 1]


@pytest.mark.parametrize("method", METHODS)
def test_reference_backend_gives_the_same_masks(method: str) -> None:
    native = prune(net(), method, sparsity=0.7, apply=False)
    reference = prune(net(), method, sparsity=0.7, apply=False, backend="reference")
    if method in ("random", "magnitude"):
        assert native == reference
    assert native.kept == reference.kept
    assert agreement(native, reference) > 0.995


@pytest.mark.parametrize("method", ["magnitude", "synflow", "dpai"])
def test_wrapped_models(method: str) -> None:
    expected = prune(net(), method, apply=False)
    compiled, parallel = torch.compile(net(), backend="eager"), nn.DataParallel(net())
    for model in (compiled, parallel):
        masks = prune(model, method)
        assert masks == expected
        masks.verify(model)
        assert masks.metadata["model"] == "Net"
        assert pk.analyze(model, masks, example_inputs=X) == pk.analyze(
            net(), masks, example_inputs=X
        )
    out = compiled(X)  # still runs after its weights were zeroed
    assert torch.isfinite(out).all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.b(self.a(self.embed(tokens)).relu()))
        return y


@pytest.mark.parametrize("method", ["random", "magnitude", "synflow", "dpai"])
def test_tied_weights_count_once(method: str) -> None:
    model, tokens = Tied(), torch.zeros(1, 4, dtype=torch.long)
    with pytest.warns(PaikernWarning, match=r"head\.weight is left out: the embedding"):
        masks = prune(model, method, sparsity=0.75, example_inputs=tokens)
    assert (list(masks), masks.kept) == (["a.weight"], 16)
    assert model.b.weight is model.a.weight
    assert bool((model.embed.weight != 0).all())


def test_shapes_without_values() -> None:
    """DPaI, random masks and analyze read no weight; the others say what is missing."""
    with torch.device("meta"):
        model = Net()
    x = torch.ones(1, 1, 8, 8, device="meta")
    assert prune(model, "dpai", apply=False, example_inputs=x) == prune(net(), "dpai", apply=False)
    assert prune(model, "random", apply=False) == prune(net(), "random", apply=False)
    for method in ("magnitude", "synflow"):
        with pytest.raises(ValueError, match=r"stem\.weight is on the meta device .* load the"):
            prune(model, method, apply=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_other_precisions(method: str, dtype: torch.dtype) -> None:
    """Scores are float32 or better whatever the weights are."""
    model = net().to(dtype)
    inputs = {"example_inputs": X.to(dtype)} if "example_inputs" in METHODS[method] else {}
    masks = prune(model, method, apply=False, **inputs)
    assert masks.kept == pk.budget.keep_count(TOTAL, 0.5)
    rounded = prune(model.float(), method, apply=False)
    assert agreement(masks, rounded) > 0.99


@pytest.mark.parametrize(
    "inputs",
    [
        X,
        X.repeat(7, 1, 1, 1),
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        (X,),
        {"x": X},
    ],
    ids=["ones", "batch", "values", "tuple", "dict"],
)
def test_forms_of_inputs(inputs: Any) -> None:
    """Only the shape of one sample matters."""
    expected = prune(net(), "synflow", apply=False)
    assert prune(net(), "synflow", apply=False, example_inputs=inputs) == expected


def test_scores_and_selection_are_one_round() -> None:
    for method in ("magnitude", "synflow"):
        options = {k: v for k, v in METHODS[method].items() if k != "rounds"}
        scores = pk.score(net(), method, **options)
        assert list(scores) == ["stem.weight", "body.weight", "head.weight"]
        assert all(scores.dense(n).shape == net().state_dict()[n].shape for n in scores)
        one = prune(net(), method, rounds=1, sparsity=0.4, apply=False)
        assert pk.select(scores, sparsity=0.4) == one


def test_provenance(tmp_path: Path) -> None:
    masks = prune(net(), "synflow", sparsity=0.75, seed=3, norm="identity", apply=False)
    meta = masks.metadata
    assert (meta["method"], meta["seed"], meta["sparsity"], meta["model"]) == (
        "synflow", 3, 0.75, "Net",
    )  # fmt: skip
    assert meta["arguments"] == {
        "scope": "global", "rounds": 4, "schedule": "exponential", "variant": "paper",
        "selection": "exact", "on_collapse": "warn", "norm": "identity", "monotone": True,
        "conv": "exact",
    }  # fmt: skip
    assert [h["round"] for h in meta["history"]] == [1, 2, 3, 4]
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    loaded = pk.load_masks(path)
    assert loaded == masks
    for key in ("method", "arguments", "seed", "sparsity", "history", "model"):
        assert loaded.metadata[key] == meta[key]
    loaded.apply(again := net())
    masks.verify(again)


def test_provenance_of_start_scores(tmp_path: Path) -> None:
    start = {n: torch.randn(s) for n, s in prune(net(), "random", sparsity=0.0).shapes.items()}
    masks = prune(net(), "dpai", init_scores=start, apply=False)
    assert masks.metadata["arguments"]["init_scores"] == "given for 3 layers"
    masks.save(tmp_path / "m.safetensors")
    assert pk.load_masks(tmp_path / "m.safetensors") == masks


def test_method_objects() -> None:
    masks = prune(net(), "synflow_l2", definition="b", apply=False)
    scorer = pk.scorers.SynFlowL2(definition="b")
    again = pk.prune(
        net(), scorer, sparsity=0.5, example_inputs=X, rounds=2, apply=False, progress=False
    )
    assert again == masks
    assert again.metadata["arguments"]["definition"] == "b"


def test_pruning_a_pruned_model() -> None:
    """Zeros score 0, so the second mask lies within the first."""
    model = net()
    first = prune(model, "magnitude", sparsity=0.5)
    second = prune(model, "magnitude", sparsity=0.8)
    assert all(bool((first[n] | ~second[n]).all()) for n in first)
    copied = copy.deepcopy(model)
    assert pk.MaskSet.from_model(copied) == second


def test_methods_and_backends_tables() -> None:
    assert set(METHODS) <= {row["name"] for row in pk.methods()}
    rows = {row["name"]: row for row in pk.backends()}
    assert rows["reference"]["usable"]
    assert rows["cpu"]["usable"]


@pytest.mark.parametrize("method", ["magnitude", "synflow", "dpai", "npb", "phew"])
def test_another_default_device_changes_nothing(method: str) -> None:
    options = {"steps": 3} if method == "dpai" else {"rounds": 3} if method == "synflow" else {}
    model, x = net(), X
    here = pk.prune(
        model, method, sparsity=0.5, example_inputs=x, apply=False, progress=False, **options
    )
    with torch.device("meta"):
        there = pk.prune(
            model, method, sparsity=0.5, example_inputs=x, apply=False, progress=False, **options
        )
        assert pk.analyze(model, there, example_inputs=x).kept == here.kept
        assert pk.select(pk.score(model, "magnitude"), sparsity=0.5).kept == here.kept
    assert here == there
