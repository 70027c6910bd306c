"""Inputs of the wrong kind: bytes, integers, token numbers, other dtypes, channels last."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern._inputs import fix_for
from paikern.errors import PaikernError
from python_tests.scorers.data_nets import Residual, assert_same_state, prepared, state_of

ROWS = {row["name"]: row for row in pk.methods()}
READS = sorted(n for n, row in ROWS.items() if row["needs_data"] or row["needs_inputs"])
IMAGES = torch.randint(
    0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
)
LABELS = torch.arange(6) % 4
TOKENS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(1))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(20, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(input_ids))).mean(1))


def options(method: str) -> dict[str, Any]:
    found: dict[str, Any] = {"batches": 1} if method.startswith("prospr") else {}
    if method == "dpai":
        found["steps"] = 2
    elif ROWS[method]["rounds"] > 1:
        found["rounds"] = 1
    return found


def refusal(model: nn.Module, method: str, data: Any, capfd: Any, **given: Any) -> str:
    """The one line of a refusal; nothing is logged and the model is as before."""
    before = state_of(model)
    capfd.readouterr()
    with pytest.raises((ValueError, PaikernError)) as told:
        pk.prune(model, method, sparsity=0.3, data=data, progress=False, **options(method), **given)
    out, err = capfd.readouterr()
    assert out == err == ""
    assert_same_state(model, before)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(("data: ", "example_inputs: ", f"{type(model).__name__}: "))
    return str(told.value)


def small(name: str) -> tuple[nn.Module, Tensor]:
    """A model and images of bytes for it."""
    torch.manual_seed(0)
    if name == "residual":
        return prepared(Residual()), IMAGES
    if name == "resnet20":  # its pool is what torch.export speaks of first
        return pk.zoo.create("resnet20", image_size=8), IMAGES
    return pk.zoo.create("mlp", sizes=(192, 16, 4)), IMAGES.flatten(1)


@pytest.mark.parametrize("name", ["resnet20", "mlp"])
@pytest.mark.parametrize("method", READS)
def test_images_of_bytes(method: str, name: str, capfd: Any) -> None:
    model, images = small(name)
    line = refusal(model, method, (images, LABELS), capfd)
    assert "torch.uint8" in line or "could not be traced" in line or "no floating output" in line
    assert "x.float() / 255" in line


@pytest.mark.parametrize("method", READS)
def test_images_of_integers(method: str, capfd: Any) -> None:
    model, images = small("resnet20")
    line = refusal(model, method, (images.long(), LABELS), capfd)
    assert "floats, got torch.int64" in line


@pytest.mark.parametrize("method", READS)
def test_bytes_as_example_inputs(method: str, capfd: Any) -> None:
    model, images = small("resnet20")
    given = {"example_inputs": images[:1]}
    data = (images.float() / 255, LABELS)
    if ROWS[method]["needs_inputs"]:
        assert "x.float() / 255" in refusal(model, method, data, capfd, **given)
    else:  # nothing is traced, so that nobody looks at it
        pk.prune(model, method, sparsity=0.3, data=data, progress=False, **options(method), **given)


def test_px_with_bytes_beside_an_example_of_floats(capfd: Any) -> None:
    model, images = small("mlp")
    line = refusal(model, "px", images, capfd, example_inputs=torch.ones(1, 192))
    assert line.startswith(
        "data: inputs must be floating point, got torch.uint8; convert with x.fl"
    )


@pytest.mark.parametrize("data", [TOKENS, {"input_ids": TOKENS}, (TOKENS, LABELS), [TOKENS]])
def test_token_numbers_have_no_squares(data: Any, capfd: Any) -> None:
    line = refusal(Text(), "px", data, capfd)
    assert line == (
        "data: px squares its inputs, so they have to be floats, got torch.int64; token numbers "
        "have no squares: use ntk_sap or wanda"
    )
    with pytest.raises(ValueError, match=r"^data: px squares its inputs"):
        pk.score(Text(), "px", data=data)


@pytest.mark.parametrize("method", READS)
def test_token_numbers_as_floats(method: str, capfd: Any) -> None:
    line = refusal(Text(), method, (TOKENS.float(), LABELS), capfd)
    assert "token numbers have to be integers, got torch.float32: x.long()" in line


@pytest.mark.parametrize("method", ["snip", "wanda", "ntk_sap", "force", "grasp"])
def test_floats_of_another_dtype(method: str, capfd: Any) -> None:
    model, images = small("residual")
    line = refusal(model, method, (images.double(), LABELS), capfd)
    assert line.endswith(
        "; its weights are torch.float32 and the inputs torch.float64: x.to(torch.float32)"
    )


@pytest.mark.parametrize("method", READS)
def test_channels_last(method: str, capfd: Any) -> None:
    model, images = small("residual")
    line = refusal(model, method, (images.float().movedim(1, -1), LABELS), capfd)
    assert "images have to be [n, channels, height, width], got " in line
    assert line.endswith(": x.movedim(-1, 1)")


def test_nothing_is_said_where_nothing_is_known() -> None:
    conv = nn.Conv2d(3, 4, 3)
    assert fix_for(conv, torch.ones(1, 5, 8, 8)) == ""
    assert fix_for(conv, torch.ones(1, 3, 8, 3)) == ""  # narrow images
    assert fix_for(nn.Linear(4, 2), torch.ones(1, 8, 8, 3)) == ""
    assert fix_for(Text(), TOKENS + 100) == ""
    assert fix_for(Text(), {"input_ids": TOKENS, "attention_mask": torch.ones(6, 5)}) == ""
    assert fix_for(nn.Linear(4, 2), (torch.ones(2, 4), torch.ones(2, 4) > 0)) == ""
    assert fix_for(nn.Identity(), torch.ones(2)) == ""
    assert fix_for(nn.Identity(), ["text", None]) == ""


def test_other_records_of_that_log_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    model, images = small("resnet20")
    with pytest.raises(ValueError, match="could not be traced"):
        pk.prune(model, "synflow", sparsity=0.3, example_inputs=images)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    assert log.name not in {record.name for record in caplog.records}
    log.error("failed while attempting to run meta for %s", "an operation")
    assert caplog.records[-1].name == log.name
