"""`make_loss`: which number is differentiated, and what is refused before anything is."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paikern.batches import Batch
from paikern.gradients import make_loss


class ModelOutput(OrderedDict[str, Tensor]):
    """Entries that are attributes, too, as those of transformers."""

    def __getattr__(self, name: str) -> Tensor:
        return self[name]


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])
LABELS = torch.tensor([2, 1])
X = torch.ones(2, 4)


def loss(
    loss_fn: Any = None, outputs: Any = LOGITS, targets: Any = LABELS, inputs: Any = X, t: float = 1
) -> Tensor:
    return make_loss(loss_fn, t)(outputs, Batch(inputs, targets))


def test_integer_labels_ask_for_cross_entropy_and_floats_for_the_squared_error() -> None:
    assert loss() == F.cross_entropy(LOGITS, LABELS)
    assert loss(targets=LOGITS * 2) == F.mse_loss(LOGITS, LOGITS * 2)
    assert loss(outputs=LOGITS[:, :1], targets=torch.tensor([1.0, 2.0])) == pytest.approx(2.5)


def test_cross_entropy_and_nll_of_logits_differ() -> None:
    assert loss("nll_logits") == -(0.5 + 1.0) / 2
    assert loss("cross_entropy") == F.cross_entropy(LOGITS, LABELS)
    assert loss("mse", targets=LOGITS) == 0


def test_probabilities_as_labels() -> None:
    share = torch.softmax(LOGITS.flip(1), 1)
    assert loss("cross_entropy", targets=share) == F.cross_entropy(LOGITS, share)


def test_temperature_divides_the_outputs() -> None:
    assert loss(t=200) == F.cross_entropy(LOGITS / 200, LABELS)
    assert loss(lambda y, _: y.sum(), t=2) == LOGITS.sum() / 2


def test_a_function_gets_cooled_outputs_in_the_form_of_the_model() -> None:
    two = (LOGITS, (LOGITS * 3, LABELS))
    assert (
        loss(lambda y, _: (y[0] + y[1][0] + y[1][1][:, None]).sum(), outputs=two, t=2)
        == (LOGITS * 2 + LABELS[:, None]).sum()
    )
    for outputs in ({"logits": LOGITS, "aux": LOGITS}, ModelOutput(logits=LOGITS, aux=LOGITS)):
        assert loss(lambda y, _: y["logits"].sum(), outputs=outputs, t=2) == LOGITS.sum() / 2
        assert loss(lambda y, _: y["aux"].sum(), outputs=outputs, t=2) == LOGITS.sum()
        assert torch.equal(outputs["logits"], LOGITS)  # the model's own are left alone
    heads = {"a": LOGITS, "b": LOGITS}
    assert loss(lambda y, _: (y["a"] + y["b"]).sum(), outputs=heads, t=2) == LOGITS.sum()
    named = SimpleNamespace(logits=LOGITS)
    assert loss(lambda y, _: y.logits.sum(), outputs=named, t=2) == LOGITS.sum() / 2
    assert named.logits is LOGITS


def test_a_function_gets_outputs_and_labels() -> None:
    assert loss(lambda y, t: (y.sum(1) * t).sum()) == (LOGITS.sum(1) * LABELS).sum()
    tokens = {"input_ids": LABELS[:, None]}
    assert loss(lambda y, t: t["input_ids"].sum() + 0.0, targets=None, inputs=tokens) == 3


def test_outputs_in_containers() -> None:
    expected = F.cross_entropy(LOGITS, LABELS)
    for outputs in (SimpleNamespace(logits=LOGITS), {"logits": LOGITS}, (LOGITS, "more")):
        assert loss(outputs=outputs) == expected


def test_the_models_own_loss_is_taken_unless_another_is_named() -> None:
    own = SimpleNamespace(loss=torch.tensor(7.0), logits=LOGITS)
    assert loss(outputs=own, targets=None) == 7
    assert loss("cross_entropy", outputs=own) == F.cross_entropy(LOGITS, LABELS)
    assert loss(outputs=own, t=2) == F.cross_entropy(LOGITS / 2, LABELS)


def test_a_language_models_labels_are_those_of_the_next_place() -> None:
    class CausalLMOutput(SimpleNamespace):
        pass

    scores = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(10).reshape(2, 5) % 7
    ids[0, 3:] = -100
    inputs = {"input_ids": ids.clamp(min=0)}
    expected = F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    found = loss("cross_entropy", CausalLMOutput(logits=scores), ids, inputs)
    torch.testing.assert_close(found, expected)
    # Labels of a token classifier belong to their own places.
    plain = loss("cross_entropy", SimpleNamespace(logits=scores), ids, inputs)
    torch.testing.assert_close(plain, F.cross_entropy(scores.flatten(0, 1), ids.flatten()))


def test_images_of_classes() -> None:
    scores = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(32).reshape(2, 4, 4) % 3
    torch.testing.assert_close(
        loss(outputs=scores, targets=labels), F.cross_entropy(scores, labels)
    )


def test_half_precision_is_summed_in_float32() -> None:
    assert loss(outputs=LOGITS.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("message", "given"),
    [
        ("loss_fn must be a function or one of", {"loss_fn": "ce"}),
        ("temperature must be above 0, got 0", {"t": 0}),
        ("the loss needs labels", {"targets": None}),
        ("labels must be a tensor, got dict", {"targets": {"y": LABELS}}),
        ("labels run from 0 to 3, but the model has 3", {"targets": torch.tensor([0, 3])}),
        ("labels run from -1 to 2", {"targets": torch.tensor([-1, 2])}),
        (r"labels of shape \[3\] do not fit", {"targets": torch.tensor([0, 1, 2])}),
        (r"labels of shape \[2, 3\] do not fit", {"targets": torch.eye(3)[:2].long()}),
        (r"targets of shape \[2\] do not fit .* \[2, 3\]", {"targets": torch.ones(2)}),
        ("returns str, in which no class scores", {"outputs": "text"}),
        (r"must return one number, got \[2, 3\]; add .mean", {"loss_fn": lambda y, t: y}),
        ("must return one number, got float", {"loss_fn": lambda y, t: 1.0}),
    ],
)
def test_refused(message: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**given)
