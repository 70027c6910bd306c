"""Loss functions that fail: one line with method and batch, the cause kept, the model untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import paikern as pk
from paikern.errors import PaikernError
from python_tests.scorers.data_nets import Residual, assert_same_state, prepared, state_of

METHODS = sorted(row["name"] for row in pk.methods() if row["takes_loss"])
Loss = Callable[[Tensor, Tensor], Any]
SECOND = 1  # the batch in which things go wrong; ProsPr's batches are its steps
GENERATOR = torch.Generator().manual_seed(4)
BATCHES = [(torch.randn(8, 3, 8, 8, generator=GENERATOR), torch.arange(8) % 4) for _ in range(4)]


class FailsAt:
    """Cross-entropy until batch `at`, `then` from there on."""

    def __init__(self, then: Loss, at: int) -> None:
        self.then, self.at, self.calls = then, at, 0

    def __call__(self, outputs: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        if self.calls > self.at:
            return self.then(outputs, labels)
        return F.cross_entropy(outputs, labels)


def failed(method: str, then: Loss, at: int = SECOND) -> Exception:
    """The error of a run whose loss fails at batch `at`; the model has to be as it was."""
    torch.manual_seed(0)
    model = prepared(Residual())
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.norm2.eval()
    before = state_of(model)
    with pytest.raises((ValueError, PaikernError)) as told:
        pk.prune(
            model, method, sparsity=0.5, data=BATCHES, loss_fn=FailsAt(then, at), progress=False
        )
    assert_same_state(model, before)
    assert "\n" not in str(told.value)
    return told.value


def raising(error: Exception) -> Loss:
    def loss(outputs: Tensor, labels: Tensor) -> Any:
        raise error

    return loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "error",
    [
        KeyError("labels"),
        RuntimeError("shapes differ\nin two lines"),
        ZeroDivisionError(),
        IndexError("index 9 is out of range"),
        TypeError("cross_entropy() takes 1 argument"),
        AssertionError("no such label"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_inside(method: str, error: Exception) -> None:
    told = failed(method, raising(error))
    first = (str(error) or "no message").splitlines()[0]
    assert str(told) == (
        f"loss_fn: it raised {type(error).__name__} on batch {SECOND} in method '{method}': "
        f"{first}; it is called as loss_fn(outputs, labels)"
    )
    assert told.__cause__ is error
    assert isinstance(told, ValueError)


@pytest.mark.parametrize("error", [PaikernError("mine"), torch.OutOfMemoryError("full")])
def test_errors_that_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as told:
        pk.score(prepared(Residual()), "snip", data=BATCHES, loss_fn=raising(error))
    assert told.value is error


def test_an_interrupt_passes_unchanged() -> None:
    model = prepared(Residual())
    before = state_of(model)

    def stop(outputs: Tensor, labels: Tensor) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pk.prune(model, "snip", sparsity=0.5, data=BATCHES, loss_fn=stop)
    assert_same_state(model, before)


RETURNS: dict[str, tuple[Loss, str]] = {
    "nothing": (lambda y, t: None, "must return one number, got None on batch"),
    "a Python float": (lambda y, t: y.sum().item(), "must return one number, got float on batch"),
    "a Python int": (lambda y, t: 3, "must return one number, got int on batch"),
    "a bool": (lambda y, t: True, "must return one number, got bool on batch"),
    "a NumPy number": (lambda y, t: np.float32(3), "must return one number, got float32 on batch"),
    "a tuple": (lambda y, t: (y.sum(), y), "must return one number, got tuple on batch"),
    "a loss a sample": (
        lambda y, t: F.cross_entropy(y, t, reduction="none"),
        r"must return one number, got [8] on batch",
    ),
    "an empty tensor": (lambda y, t: y[:0].flatten(), "must return one number, got [0] on batch"),
    "an integer": (
        lambda y, t: (y.argmax(1) == t).sum(),
        "must return one number of a floating-point dtype, got torch.int64 on batch",
    ),
    "a truth value": (
        lambda y, t: (y.argmax(1) == t).all(),
        "must return one number of a floating-point dtype, got torch.bool on batch",
    ),
    "a complex number": (
        lambda y, t: y.sum() * 1j,
        "must return one number of a floating-point dtype, got torch.complex64 on batch",
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", RETURNS)
def test_what_is_no_number(method: str, what: str) -> None:
    loss, message = RETURNS[what]
    told = failed(method, loss)
    assert str(told).startswith(f"loss_fn {message} {SECOND} in method '{method}'; ")
    assert isinstance(told, ValueError)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite(method: str, value: float) -> None:
    told = failed(method, lambda y, t: y.sum() * 0 + value)
    start = f"loss_fn: the loss of batch {SECOND} is {value} in method '{method}'; look for"
    assert str(told).startswith(start)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda y, t: y.detach().sum(),
        lambda y, t: t.float().mean(),
        lambda y, t: torch.tensor(y.sum().item()),
        lambda y, t: torch.tensor(2.0, requires_grad=True),
        lambda y, t: y.new_ones(3).requires_grad_().sum(),
    ],
    ids=["detached", "of the labels", "item", "a leaf", "of a leaf"],
)
def test_a_number_without_a_gradient(method: str, loss: Loss) -> None:
    told = failed(method, loss)
    assert str(told).startswith(
        f"loss_fn: the loss of batch {SECOND} does not depend on the weights in method '{method}';"
    )


@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_an_earlier_batch(method: str) -> None:
    """The graph of a loss that is handed out twice is gone."""
    held: list[Tensor] = []

    def stale(outputs: Tensor, labels: Tensor) -> Tensor:
        held.append(F.cross_entropy(outputs, labels))
        return held[0]

    told = failed(method, stale, at=0)
    if method in ("prospr", "prospr_s"):  # each of their steps has weights of its own
        assert str(told).startswith("loss_fn: the loss of batch 1 does not depend on the weights")
        return
    assert f"the backward pass of batch 1 in method '{method}' failed: Trying" in str(told)
    assert isinstance(told.__cause__, RuntimeError)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_changed_in_place(method: str) -> None:
    """exp() needs its result for the derivative."""

    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        value = outputs.exp()
        total = value.sum()
        value.mul_(2)
        return total

    told = failed(method, broken)
    assert f"the backward pass of batch 1 in method '{method}' failed: one of the" in str(told)
    assert isinstance(told.__cause__, RuntimeError)
