"""Wrong data, losses, options and models of the methods that differentiate a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern.errors import PaikernError, PaikernWarning
from python_tests.gradients.nets import batches, double, make

X, Y = batches("mlp", 1)[0]


def unequal() -> list[tuple[Tensor, Tensor]]:
    return [(X[:8], Y[:8]), (X[8:], Y[8:])]


@pytest.mark.parametrize("method", ["snip", "force", "grasp", "crop"])
@pytest.mark.parametrize(
    ("message", "given"),
    [
        (r"data: method '\w+' reads samples", {"data": None}),
        ("data: no sample was given", {"data": []}),
        ("data: the loss needs labels", {"data": X}),
        ("data: inputs hold NaN", {"data": (X / 0, Y)}),
        ("data: labels run from 0 to 9, but the model has 4 outputs", {"data": (X, Y * 3)}),
        (r"data: the model does not take a batch of torch.float32 \[11, 6\]: 0 \(Linear\)",
         {"data": (X[:, :6], Y)}),
        ("must return one number", {"loss_fn": lambda y, t: y}),
        ("the loss of batch 0 is nan", {"loss_fn": lambda y, t: y.sum() * float("nan")}),
        ("does not depend on the weights", {"loss_fn": lambda y, t: t.float().sum()}),
        ("loss_fn must be a function or one of", {"loss_fn": "crossentropy"}),
        (r"reads 3 batches a round, but there are only 2; .*batches=2",
         {"data": [(X, Y), (X, Y)], "batches": 3}),
        ("batches must be >= 1 or None, got 0", {"batches": 0}),
        ("mode must be 'train' or 'eval', got 'test'", {"mode": "test"}),
        ("batch_size must be >= 1, got 0", {"batch_size": 0}),
        (r"batches must be an integer or None, got 1\.5", {"batches": 1.5}),
        ("batches must be an integer or None, got True", {"batches": True}),
        (r"batch_size must be an integer, got 2\.5", {"batch_size": 2.5}),
        (r"unexpected keyword argument 'labels'; .* give labels as \(\{...\}, labels\)$",
         {"data": {"input": X, "labels": Y}}),
        (r"2\.weight is frozen", {"frozen": True}),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(method: str, message: str, given: dict[str, Any]) -> None:
    net = make("mlp")
    given = {"data": (X, Y), **given}
    if given.pop("frozen", False):
        net[2].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        pk.prune(net, method, sparsity=0.5, progress=False, **given)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_that_are_none(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
        pk.prune(make("mlp"), "grasp", sparsity=0.5, data=(X, Y), temperature=temperature)


@pytest.mark.parametrize("method", ["grasp", "crop", "cropit"])
def test_a_loss_without_curvature_is_refused(method: str) -> None:
    with pytest.raises(PaikernError, match=f"{method}: the Hessian times the gradient is 0"):
        pk.prune(
            nn.Linear(7, 4), method, sparsity=0.5, data=(X, Y), loss_fn=lambda y, t: y.sum(),
            progress=False,
        )  # fmt: skip


def test_unequal_batches_are_told_and_count_by_their_samples() -> None:
    net = make("conv").double()
    x, y = double(batches("conv", 1)[0])
    whole = pk.score(net, "force", data=(x, y), mode="eval")
    with pytest.warns(PaikernWarning, match="batches of 3 to 6 samples: each counts by its"):
        pk.prune(
            net, "force", sparsity=0.2, rounds=1, mode="eval", apply=False,
            data=[(x[:6], y[:6]), (x[6:], y[6:])],
        )  # fmt: skip
    parts = pk.score(net, "force", data=[(x[:6], y[:6]), (x[6:], y[6:])], mode="eval")
    for name in whole:
        torch.testing.assert_close(
            parts.dense(name, torch.float64),
            whole.dense(name, torch.float64),
            rtol=1e-9,
            atol=1e-12,
        )


def test_layers_out_of_reach_are_listed() -> None:
    net = nn.ModuleDict({"used": nn.Linear(7, 4), "spare": nn.Linear(7, 4)})
    net.forward = lambda x: net["used"](x)  # type: ignore[method-assign]
    with pytest.warns(PaikernWarning) as told:
        pk.prune(net, "snip", sparsity=0.5, data=(X, Y), apply=False)
    texts = [str(warning.message) for warning in told]
    assert any("no gradient reaches spare.weight; their scores are 0" in text for text in texts)
    assert any("layer collapse: spare.weight" in text for text in texts)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context: Callable[[], Any]) -> None:
    expected = pk.score(make("conv"), "grasp", data=batches("conv"))
    net = make("conv")
    with context():
        found = pk.score(net, "grasp", data=batches("conv"))
    assert all(torch.equal(found.dense(n), expected.dense(n)) for n in expected)


def test_half_precision_models() -> None:
    net = make("conv").bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches("conv")]
    for method in ("snip", "force", "grasp", "crop"):
        masks = pk.prune(net, method, sparsity=0.5, data=data, rounds=1, apply=False)
        assert masks.kept == masks.total - masks.total // 2
