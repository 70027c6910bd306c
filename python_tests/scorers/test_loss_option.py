"""`loss_fn=` and `data=` for methods that have no use for them: refused, and left alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import paikern as pk
from paikern.errors import PaikernWarning
from paikern.scorers.base import scorer_class
from paikern.training import pruner_rows
from python_tests.scorers.data_nets import Residual, assert_same_state, prepared, state_of

ROWS = {row["name"]: row for row in pk.methods()}
WITHOUT = sorted(name for name, row in ROWS.items() if not row["takes_loss"])
GRADIENT_METHODS = {
    "snip", "itersnip", "force", "grasp", "grasp_it", "crop", "cropit", "prospr", "snap",
    "gate_decorators", "crop_s", "cropit_s", "prospr_s",
}  # fmt: skip
X = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.arange(12) % 4
FEW: dict[str, dict[str, Any]] = {"dpai": {"steps": 3}}


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return prepared(Residual())


def few(method: str) -> dict[str, Any]:
    return FEW.get(method, {"rounds": 2} if ROWS[method]["rounds"] > 2 else {})


def test_methods_that_take_a_loss_are_those_that_differentiate_one() -> None:
    assert ROWS.keys() - set(WITHOUT) == GRADIENT_METHODS
    assert {n for n, row in ROWS.items() if row["needs_labels"]} == GRADIENT_METHODS


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, "mse", "no such loss"])
@pytest.mark.parametrize("method", WITHOUT)
def test_a_loss_is_refused_by_methods_without_one(method: str, loss_fn: Any) -> None:
    model = net()
    before = state_of(model)
    with pytest.raises(ValueError, match=rf"^loss_fn: method '{method}' differentiates no") as told:
        pk.prune(model, method, sparsity=0.5, data=(X, Y), loss_fn=loss_fn, **few(method))
    assert "\n" not in str(told.value)
    assert "leave loss_fn= out" in str(told.value)
    with pytest.raises(ValueError, match=rf"^loss_fn: method '{method}' differentiates no loss"):
        pk.score(model, method, data=(X, Y), loss_fn=loss_fn)
    with pytest.raises(ValueError, match=rf"^loss_fn: method '{method}' differentiates no loss"):
        pk.prune(model, scorer_class(method)(), sparsity=0.5, data=(X, Y), loss_fn=loss_fn)
    assert_same_state(model, before)


@pytest.mark.parametrize("method", sorted(GRADIENT_METHODS))
def test_a_loss_is_used_by_methods_with_one(method: str) -> None:
    calls = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(labels))
        return F.cross_entropy(outputs, labels)

    options = {"batches": 1} if method.startswith("prospr") else {}
    pk.prune(
        net(), method, sparsity=0.2, data=(X, Y), loss_fn=loss, apply=False, progress=False,
        **few(method), **options,
    )  # fmt: skip
    assert calls
    assert set(calls) == {12}


@pytest.mark.parametrize("method", WITHOUT)
def test_labels_that_are_not_needed_do_no_harm(method: str) -> None:
    """`data` stands in for example_inputs, too, and labels change nothing."""
    masks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PaikernWarning)
        for data in (X, (X, Y), (X, Y * 100)):
            found = pk.prune(
                net(), method, sparsity=0.4, data=data, apply=False, progress=False, **few(method)
            )
            masks.append(found)
    assert masks[0] == masks[1] == masks[2]


def test_data_that_nobody_reads_are_not_read() -> None:
    def loader() -> Iterator[Tensor]:
        raise AssertionError("read")
        yield X

    for method in ("magnitude", "random", "random_u"):
        pk.prune(net(), method, sparsity=0.5, data=loader(), apply=False)
    with pytest.raises(ValueError, match=r"^data must be a tensor"):  # what is no data is told
        pk.prune(net(), "magnitude", sparsity=0.5, data=3)


def test_a_scorer_of_ones_own_says_that_it_takes_a_loss() -> None:
    class Own(pk.scorers.Scorer):
        name = "own"
        takes_loss = True

        def score(self, run: Any) -> Any:
            assert run.loss_fn is F.mse_loss
            return pk.scorers.Scores(
                {n: pk.scorers.Dense(run.weight(n).abs()) for n in run.layers}, run.shapes
            )

    pk.prune(net(), Own(), sparsity=0.5, loss_fn=F.mse_loss, apply=False)


@pytest.mark.parametrize("name", [row["name"] for row in pruner_rows()])
def test_pruners_refuse_a_loss_before_the_training(name: str) -> None:
    """Those that call a method of pk.prune take one where that method does."""
    model = net()
    given: dict[str, Any] = {
        "sparsity": 0.5,
        "epochs": 3,
        "data": (X, Y),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": F.cross_entropy,
    }
    if name in ("earlycrop_u", "earlycrop_s", "gate_decorators"):
        pk.pruner(name, model, **given)
        if name == "gate_decorators":
            return
        given["method"] = "l1_filters"
    kind = "pruner" if name in ("asni", "imp", "ltr") else "method"
    with pytest.raises(ValueError, match=f"^loss_fn: {kind} '.*' differentiates no loss") as told:
        pk.pruner(name, model, **given)
    assert "\n" not in str(told.value)


def test_one_shot_hands_the_loss_over() -> None:
    model, calls = net(), []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(labels))
        return F.cross_entropy(outputs, labels)

    given: dict[str, Any] = {"sparsity": 0.5, "epochs": 1, "data": (X, Y), "loss_fn": loss}
    pruner = pk.pruner("one_shot", model, method="snip", **given)
    assert pruner.on_epoch_end().pruned
    assert calls == [12]
