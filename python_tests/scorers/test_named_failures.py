"""What goes wrong is named by what caused it: the loss, the learning rate, a layer's inputs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from paikern.errors import NonFiniteScoreError
from python_tests.scorers.data_nets import (
    Residual,
    assert_same_state,
    prepared,
    state_of,
    transformer,
)

ROWS = {row["name"]: row for row in pk.methods()}
WITH_LOSS = sorted(name for name, row in ROWS.items() if row["takes_loss"])
WITHOUT_LOSS = sorted(
    name
    for name, row in ROWS.items()
    if not row["takes_loss"] and (row["needs_data"] or row["needs_inputs"])
)
STEPS = ("prospr", "prospr_s")
GENERATOR = torch.Generator().manual_seed(6)
X, Y = torch.randn(8, 3, 8, 8, generator=GENERATOR), torch.arange(8) % 4
QUICK: dict[str, dict[str, Any]] = {"dpai": {"steps": 2}, "ntk_sap": {"rounds": 2}}


def model_of(kind: type[nn.Module] = Residual) -> nn.Module:
    torch.manual_seed(0)
    return prepared(kind())


def told(model: nn.Module, method: str, **options: Any) -> str:
    """The error of a run, one line; the model has to be as it was."""
    before = state_of(model)
    with pytest.raises(ValueError) as error:
        pk.prune(model, method, **{"sparsity": 0.5, "progress": False, **options})
    assert_same_state(model, before)
    assert "\n" not in str(error.value)
    return str(error.value)


def batches(method: str) -> dict[str, Any]:
    return {"batches": 1} if method in STEPS else {}


# The loss


class Complex(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1j)


@pytest.mark.parametrize("labels", [Y, torch.ones(8, 4)], ids=["classes", "values"])
@pytest.mark.parametrize("method", [m for m in WITH_LOSS if not ROWS[m]["structured"]])
def test_complex_outputs(method: str, labels: Tensor) -> None:
    message = told(model_of(Complex), method, data=(X, labels), **batches(method))
    assert message == (
        f"loss_fn: the outputs of the model are torch.complex64 on batch 0 in method '{method}', "
        "of which no loss is known; pass loss_fn=, a function that returns a real number"
    )


@pytest.mark.parametrize("method", WITH_LOSS)
def test_complex_labels_and_losses(method: str) -> None:
    given = torch.ones(8, 4, dtype=torch.complex64)
    message = told(model_of(), method, data=(X, given), **batches(method))
    assert message.startswith("loss_fn: the labels are torch.complex64 on batch 0 in method")
    message = told(
        model_of(), method, data=(X, Y), loss_fn=lambda y, t: y.sum() * 1j, **batches(method)
    )
    assert message.endswith("; return its .real or .abs()")


@pytest.mark.parametrize("method", STEPS)
def test_a_loss_of_norms_alone(method: str) -> None:
    """The steps move the norm, so that the loss has a gradient, but none of a prunable weight."""
    model = model_of()
    message = told(
        model, method, data=(X, Y), batches=1, loss_fn=lambda y, t: model.norm1.weight.sum()
    )
    assert message.startswith("loss_fn: the loss of batch 0 does not depend on the weights")


def test_a_connected_loss_of_0_keeps_by_position_and_says_so() -> None:
    with pytest.warns(pk.PaikernWarning, match="snip: scores carry no information"):
        pk.prune(
            model_of(), "snip", sparsity=0.5, data=(X, Y), loss_fn=lambda y, t: (y * 0).sum(),
            on_collapse="floor",
        )  # fmt: skip


# The gates of gate_decorators are clamped, offsets of infinity too.
@pytest.mark.parametrize("method", [m for m in WITH_LOSS if m != "gate_decorators"])
def test_a_loss_of_broken_parameters(method: str) -> None:
    model = model_of()
    with torch.no_grad():
        model.norm2.bias[:3] = torch.inf
    message = told(model, method, data=(X, Y), **batches(method))
    assert message == (
        f"loss_fn: the loss of batch 0 is nan in method '{method}'; look at norm2.bias of the "
        "model, which holds 3 NaN or infinite values: repair it"
    )


# The learning rate


@pytest.mark.parametrize("order", ["full", "first"])
@pytest.mark.parametrize("method", STEPS)
@pytest.mark.parametrize("lr", [1e20, 1e38])
def test_steps_that_are_too_large(method: str, order: str, lr: float) -> None:
    message = told(model_of(), method, data=(X, Y), batches=1, lr=lr, steps=4, order=order)
    assert message.startswith(f"lr={lr}: ")
    assert re.search(" is (nan|inf|NaN or infinite) after step ", message)
    assert message.endswith(f" of 4 in method '{method}'; use a smaller lr=")


@pytest.mark.parametrize("method", STEPS)
def test_the_first_step_and_the_labels_are_not_blamed_on_lr(method: str) -> None:
    huge = X.clamp(-1, 1) * 3e38
    message = told(model_of(), method, data=(huge, Y), batches=1, lr=1e38, mode="eval")
    assert message.startswith("loss_fn: the loss of batch 0 is")
    bad = [(X, Y), (huge, Y), (X, Y), (X, Y)]
    message = told(model_of(), method, data=bad, mode="eval", lr=1e-3)
    assert message.startswith("loss_fn: the loss of batch 1 is")


def test_a_gradient_that_is_not_finite_at_the_start() -> None:
    def steep(y: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(y, labels) + (y * 0).sum().sqrt()

    message = told(model_of(), "prospr", data=(X, Y), batches=1, loss_fn=steep)
    assert message.startswith("the gradient of ")
    assert "NaN or infinite values; use float32" in message


# The inputs of layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"sparsity": 0.5}, {"pattern": "2:4", "sparsity": None}, {"scope": "global"}],
    ids=["row", "2:4", "global"],
)
def test_wanda_names_the_layer_and_the_statistics(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = model_of().to(dtype)
    model.norm1.running_mean[2] = -torch.inf
    message = told(model, "wanda", data=[X[:4].to(dtype), X[4:].to(dtype)], **options)
    assert message == (
        "data: the inputs of body.weight on batch 0 hold NaN, infinity, or values too large to be "
        "squared, in method 'wanda'; repair norm1.running_mean of the model, which holds 1 NaN or "
        "infinite values, or leave the layer out with ignore=['body.weight']"
    )


def test_wanda_names_the_batch() -> None:
    huge = X.clone()
    huge[3] *= 1e25
    with pytest.raises(NonFiniteScoreError, match=r"inputs of stem\.weight on batch 1 hold") as e:
        pk.prune(model_of(), "wanda", sparsity=0.5, data=[X, huge])
    assert str(e.value).endswith(
        "scale the inputs, or use float32 weights, or leave the layer out with ignore="
        "['stem.weight']"
    )


def test_wanda_names_transposed_convolutions() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert "inputs of 0.weight on batch 0" in told(model, "wanda", data=X * 1e30)


# Labels


LABELS: dict[str, Any] = {
    "out of range": torch.full((8,), 999),
    "negative": torch.full((8,), -7),
    "NaN": torch.full((8,), torch.nan),
    "complex": torch.ones(8, dtype=torch.complex64),
    "too few": torch.zeros(3, dtype=torch.long),
}


@pytest.mark.filterwarnings("ignore:.*would have lost all channels")
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("method", WITHOUT_LOSS)
def test_methods_without_a_loss_ignore_labels(method: str, labels: str) -> None:
    options = {"sparsity": 0.5, "progress": False, **QUICK.get(method, {})}
    expected = pk.prune(model_of(), method, data=X, **options)
    found = pk.prune(model_of(), method, data=(X, LABELS[labels]), **options)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["wanda", "ntk_sap"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_transformers_are_not_given_labels(name: str, method: str) -> None:
    model, batch = transformer(name)
    plain = {key: value for key, value in batch.items() if key != "labels"}
    wrong = {**batch, "labels": torch.full_like(batch["labels"], 999)}
    before = state_of(model)
    found, expected = (pk.score(model, method, data=data, batches=1) for data in ([wrong], [plain]))
    for key in expected:
        assert torch.equal(found.dense(key), expected.dense(key))
    assert_same_state(model, before)


@pytest.mark.filterwarnings("ignore:.*is left out")
def test_decoders_are_given_the_labels_that_their_inputs_come_from() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    ids = torch.randint(2, 40, (4, 6), generator=torch.Generator().manual_seed(1))
    shifted = torch.cat([torch.zeros(4, 1, dtype=torch.long), ids[:, :-1]], 1)
    found = pk.score(model, "wanda", data={"input_ids": ids, "labels": ids})
    expected = pk.score(model, "wanda", data={"input_ids": ids, "decoder_input_ids": shifted})
    for name in expected:
        torch.testing.assert_close(found.dense(name), expected.dense(name))
