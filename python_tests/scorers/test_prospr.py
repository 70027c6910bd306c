"""ProsPr against unrolled training in float64, its limits, and what it must leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.errors import NonFiniteScoreError, PaikernError
from python_tests.oracles.prospr import prospr_scores
from python_tests.scorers.data_nets import (
    NETWORKS,
    assert_same_state,
    double,
    network,
    prepared,
    state_of,
    transformer,
)
from python_tests.scorers.helpers import agreement

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.5},
    "published": {"momentum": 0.5, "variant": "published"},
    "first order": {"order": "first", "momentum": 0.5},
}


def parts(data: Any, count: int) -> list[Any]:
    if isinstance(data, dict):
        size = len(data["labels"]) // count
        return [{k: v[i * size : (i + 1) * size] for k, v in data.items()} for i in range(count)]
    size = len(data[1]) // count
    return [tuple(t[i * size : (i + 1) * size] for t in data) for i in range(count)]


def expected_scores(
    model: nn.Module, batches: list[Any], setting: str = "default", **more: Any
) -> dict[str, torch.Tensor]:
    options = dict(SETTINGS[setting])
    published = options.pop("variant", "paper") == "published"
    names = list(pk.score(model, "magnitude"))
    return prospr_scores(
        model, names, batches, lr=0.05, detach_first_buffer=published, **options, **more
    )


def close(found: pk.Scores, expected: dict[str, torch.Tensor], rtol: float) -> None:
    assert list(found) == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(
            found.dense(name, torch.float64), values, rtol=rtol, atol=rtol * float(values.max())
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", NETWORKS)
def test_against_unrolled_training(name: str, setting: str, dtype: torch.dtype) -> None:
    model, data = network(name)
    batches = parts(data, 3)
    expected = expected_scores(model, batches, setting)
    if dtype == torch.float64:
        model, batches = model.double(), [double(b) for b in batches]
    model.eval()
    before = state_of(model)
    options = {"steps": 2, "lr": 0.05, **SETTINGS[setting]}
    scores = pk.score(model, "prospr", data=batches, **options)
    assert_same_state(model, before)
    wide = dtype == torch.float64 and name != "llama"  # its norms are computed in float32
    close(scores, expected, 1e-9 if wide else 1e-5)
    masks = pk.prune(model, "prospr", sparsity=0.8, data=batches, apply=False, **options)
    best = pk.select(
        pk.Scores({n: pk.Dense(s) for n, s in expected.items()}, scores.shapes), sparsity=0.8
    )
    assert masks.kept == best.kept
    assert agreement(dict(masks), dict(best)) >= 0.999


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_rounds_hold_what_is_pruned(name: str) -> None:
    model, data = network(name)
    model, batches = model.double(), [double(b) for b in parts(data, 4)]
    found, masks = None, None
    for sparsity in (0.3, 0.6, 0.8):
        expected = expected_scores(model, batches, "momentum", masks=masks)
        found = pk.score(
            model, "prospr", data=batches, momentum=0.5, lr=0.05,
            masks=None if masks is None else pk.MaskSet.from_bool(masks),
        )  # fmt: skip
        if masks is not None:
            expected = {n: torch.where(masks[n], s, 0) for n, s in expected.items()}
        close(found, expected, 1e-9)
        masks = dict(pk.select(found, sparsity=sparsity))


@pytest.mark.parametrize("name", ["mlp", "residual", "gpt2"])
def test_tends_to_snip(name: str) -> None:
    """One step that goes nowhere, on the batch of the loss."""
    model, data = network(name)
    found = pk.score(model, "prospr", data=data, steps=1, lr=1e-7, batches=1)
    snip = pk.score(model, "snip", data=data)
    close(found, {n: snip.dense(n, torch.float64) for n in snip}, 1e-4)


def test_one_step_by_hand() -> None:
    """L = w**2 / 2 at x = 1: w_1 = (1 - lr) m w, so that dL/dm = (1 - lr)**2 w**2."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(3.0)
    data = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    half = lambda outputs, targets: (outputs - targets).square().mean() / 2  # noqa: E731
    options: dict[str, Any] = {"data": data, "loss_fn": half, "batches": 1, "steps": 1, "lr": 0.5}
    found = pk.score(model, "prospr", **options)
    assert found.dense("weight", torch.float64).item() == pytest.approx(0.5**2 * 9)
    first = pk.score(model, "prospr", order="first", **options)
    assert first.dense("weight", torch.float64).item() == pytest.approx(0.5 * 9)


def test_dropout_is_the_same_when_a_step_is_run_again() -> None:
    """Forwards of a step differ only by dropout, whose values the second derivative repeats."""
    seen: dict[int, list[torch.Tensor]] = {}

    class Watched(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            seen.setdefault(len(x), []).append((y == 0).detach())
            return y

    model = nn.Sequential(nn.Linear(6, 30), Watched(0.5), nn.Linear(30, 4))
    batches = [(torch.randn(n, 6), torch.zeros(n, dtype=torch.long)) for n in (3, 4, 5)]
    pk.score(model, "prospr", data=batches, steps=2, seed=3)
    for size in (3, 4):
        first, again = seen[size]
        assert torch.equal(first, again)
    assert len(seen[5]) == 1
    assert not torch.equal(seen[3][0], seen[4][0][:3])


def test_data_are_used_in_turn() -> None:
    model, data = network("mlp")
    batches = parts(data, 2)
    found = pk.score(model, "prospr", data=batches, batches=2, steps=3, lr=0.05)
    again = pk.score(model, "prospr", data=batches * 2, steps=3, lr=0.05)
    assert all(torch.equal(found.dense(n), again.dense(n)) for n in found)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_checkpointed_blocks(name: str, attention: str) -> None:
    """They are computed again in the backward pass, at the weights of that step."""
    model, data = transformer(name, attention)
    batches = parts(data, 3)
    expected = pk.score(model, "prospr", data=batches, steps=2, lr=0.05)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = pk.score(model, "prospr", data=batches, steps=2, lr=0.05)
    close(found, {n: expected.dense(n, torch.float64) for n in expected}, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": float("inf")}, "lr must be above 0 and finite"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"order": "second"}, "order must be 'full' or 'first'"),
        ({"steps": 5, "batch_size": 10}, "there are only 2"),
        (
            {"batches": 1, "loss_fn": lambda y, t: y.mean().log() * 0 - float("nan")},
            "loss of batch 0 is nan",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model, data = network("residual")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        pk.prune(model, "prospr", sparsity=0.5, data=data, **{"batches": None, **options})
    assert_same_state(model, before)


def test_steps_that_blow_up_are_named() -> None:
    model, data = network("mlp")
    before = state_of(model)
    with pytest.raises((ValueError, NonFiniteScoreError), match=r"is nan|is inf|smaller lr"):
        pk.prune(model, "prospr", sparsity=0.5, data=data, batches=1, lr=1e38, steps=4)
    assert_same_state(model, before)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.0


def test_an_operation_without_second_derivative_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(_Once.apply(self.a(x)))

    _, data = network("mlp")
    model = Model()
    with pytest.raises(PaikernError, match="cannot be differentiated as often"):
        pk.score(model, "prospr", data=data, batches=1)
    assert pk.score(model, "prospr", data=data, batches=1, order="first")


def test_a_pretrained_norm_keeps_its_statistics() -> None:
    model, data = network("residual")
    prepared(model).train()
    before = state_of(model)
    masks = pk.prune(model, "prospr", sparsity=0.9, data=data, batches=1, apply=False)
    assert_same_state(model, before)
    assert masks.kept == masks.total - int(0.9 * masks.total)
