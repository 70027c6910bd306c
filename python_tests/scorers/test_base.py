"""The registry of methods, their options, and the state of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.errors import PaikernWarning
from paikern.preparation import prepare_run
from paikern.scorers import Dense, Run, Scorer, Scores, TrainedScorer, base


@pytest.fixture
def registry() -> Iterator[None]:
    """Methods registered by a test are forgotten after it."""
    before = dict(base._SCORERS)
    yield
    base._SCORERS.clear()
    base._SCORERS.update(before)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def test_methods_table() -> None:
    rows = {row["name"]: row for row in pk.methods()}
    assert {"dpai", "logsynflow", "magnitude", "random", "synflow", "synflow_l2"} <= set(rows)
    for row in rows.values():
        assert row["summary"]
        assert row["source"]
        assert row["cost"], row["name"]
        assert row["weakness"], row["name"]
        assert row["needs_data"] or not row["needs_labels"]
        assert "paper" in row["variants"]
    assert rows["dpai"]["options"]["alpha"] == 0.99
    assert rows["dpai"]["scope"] == "erk"
    assert rows["synflow"]["rounds"] == 100
    assert rows["synflow"]["needs_inputs"]
    assert not rows["magnitude"]["needs_inputs"]
    assert rows["synflow_l2"]["options"] == {
        "norm": "scale",
        "monotone": True,
        "conv": "exact",
        "definition": "a",
    }


@pytest.mark.parametrize("row", pk.methods(), ids=lambda row: str(row["name"]))
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_the_example_of_every_method_runs(row: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
    loader = [(torch.randn(6, 1, 5, 5), torch.arange(6) % 3) for _ in range(4)]
    given = {"pk": pk, "model": model, "inputs": loader[0][0], "loader": loader}
    masks = eval(row["example"], given)
    assert masks.metadata["method"] == row["name"]
    assert 0 < masks.kept < masks.total
    masks.verify(model)


@pytest.mark.parametrize("name", ["synflow-l2", "SynFlow_L2", "SYNFLOW-L2"])
def test_names_are_forgiving(name: str) -> None:
    assert base.scorer_class(name).name == "synflow_l2"


def test_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'synflw'; did you mean 'synflow'\?"):
        pk.prune(net(), "synflw", sparsity=0.5)
    with pytest.raises(ValueError, match=r"unknown method 'q'; see pk.methods\(\) Available: "):
        pk.prune(net(), "q", sparsity=0.5)


def test_unknown_option_suggests_the_nearest() -> None:
    message = r"alhpa: method 'dpai' has no such option; did you mean 'alpha'\?"
    with pytest.raises(ValueError, match=message):
        pk.prune(net(), "dpai", sparsity=0.5, example_inputs=torch.ones(1, 4), alhpa=0.5)
    with pytest.raises(ValueError, match="has no such option; its options: none"):
        pk.prune(net(), "magnitude", sparsity=0.5, alpha=0.5)


def test_registered_method_with_an_option(registry: None) -> None:
    @pk.register_scorer("nearest")
    class Nearest(Scorer):
        """Keeps the weights nearest to `target`."""

        target: float = 0.0
        summary = "nearest to a value"

        def score(self, run: Run) -> Scores:
            entries = {n: Dense(-(run.weight(n) - self.target).abs()) for n in run.layers}
            return Scores(entries, run.shapes)

    model = net()
    masks = pk.prune(model, "nearest", sparsity=0.5, target=0.25, apply=False)
    far = torch.cat(
        [(p.detach() - 0.25).abs().flatten() for p in (model[0].weight, model[2].weight)]
    )
    expected = torch.zeros(36, dtype=torch.bool)
    expected[far.argsort(stable=True)[:18]] = True
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), expected)
    assert masks.metadata["arguments"]["target"] == 0.25
    assert next(r for r in pk.methods() if r["name"] == "nearest")["options"] == {"target": 0.0}
    assert pk.prune(model, Nearest(target=0.25), sparsity=0.5, apply=False) == masks


def test_method_object_takes_no_further_options() -> None:
    with pytest.raises(ValueError, match="alpha: give options to the scorer itself"):
        pk.prune(net(), pk.scorers.DPaI(steps=1), sparsity=0.5, alpha=0.5)


def test_a_scorer_without_score_says_so(registry: None) -> None:
    @pk.register_scorer("empty")
    class Empty(Scorer):
        pass

    @pk.register_scorer("untrained")
    class Untrained(TrainedScorer):
        default_scope = "local"

    with pytest.raises(TypeError, match=r"Empty must implement score\(\)"):
        pk.prune(net(), "empty", sparsity=0.5)
    with pytest.raises(TypeError, match=r"Untrained must implement planned_steps\(\)"):
        pk.prune(net(), "untrained", sparsity=0.5)


def test_notes_of_a_scorer_become_warnings_once(registry: None) -> None:
    @pk.register_scorer("talkative")
    class Talkative(Scorer):
        default_rounds = 3

        def score(self, run: Run) -> Scores:
            run.notes.append("something to know")
            return Scores({n: Dense(run.weight(n), absolute=True) for n in run.layers}, run.shapes)

    with pytest.warns(PaikernWarning, match="something to know") as caught:
        masks = pk.prune(net(), "talkative", sparsity=0.5)
    assert len(caught) == 1
    assert masks.metadata["notes"][0] == "something to know"


def test_run_plans_each_flow_once() -> None:
    model = net()
    run = prepare_run(model, pk.scorers.SynFlow(), torch.ones(1, 4), (), None, 3, "paper")
    semantics = pk.pathgraph.Semantics(1)
    assert run.graph is run.graph
    assert run.flow(semantics) is run.flow(semantics)
    assert run.flow(semantics) is not run.flow(pk.pathgraph.Semantics(2))
    assert run.shapes == {"0.weight": (6, 4), "2.weight": (2, 6)}
    assert torch.equal(
        torch.rand(3, generator=run.generator()), torch.rand(3, generator=run.generator())
    )
