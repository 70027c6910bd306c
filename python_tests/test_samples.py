"""Samples from a file: inputs, labels, keyword inputs, and what is none of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paikern.loading import ModelLoadError
from paikern.samples import fit_samples, load_samples

VALUES = torch.arange(24.0).reshape(4, 6)
LABELS = torch.tensor([0, 2, 1, 0], dtype=torch.int32)


def test_inputs_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES.double().numpy())
    save_file({"x": VALUES.half()}, tmp_path / "b.safetensors")
    save_file({"x": VALUES[:1].clone(), "data": VALUES}, tmp_path / "c.bin")
    np.savez(tmp_path / "d.npz", VALUES.numpy().astype(np.float16))
    np.savez_compressed(tmp_path / "e.npz", inputs=VALUES.numpy())
    for name in ("a.npy", "b.safetensors", "c.bin", "d.npz", "e.npz"):
        found = load_samples(tmp_path / name)
        assert isinstance(found, Tensor)
        assert found.dtype == torch.float32
        assert torch.equal(found, VALUES)


def test_integers_stay_and_bytes_are_refused(tmp_path: Path) -> None:
    for kind in (np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.bool_):
        np.save(tmp_path / "a.npy", VALUES.numpy().astype(kind))
        found = load_samples(tmp_path / "a.npy")
        assert isinstance(found, Tensor)
        assert found.dtype == torch.int64
        assert torch.equal(found, VALUES.bool().long() if kind is np.bool_ else VALUES.long())
        fitted = fit_samples(found, nn.Linear(2, 2), torch.ones(1, 6))
        assert isinstance(fitted, Tensor)
        assert torch.equal(fitted, VALUES.bool().float() if kind is np.bool_ else VALUES)
    np.save(tmp_path / "b.npy", VALUES.numpy().astype(np.uint8))
    with pytest.raises(ModelLoadError, match=r"b\.npy holds bytes \[4, 6\]; save the floats"):
        load_samples(tmp_path / "b.npy")


IDS = torch.arange(8).reshape(4, 2)
TOKEN = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "example", "expected"),
    [
        (IDS, None, IDS.float()),
        (IDS, VALUES[:1], IDS.float()),
        (IDS, TOKEN, IDS),
        (IDS, (TOKEN,), IDS),
        (IDS, {"ids": TOKEN}, {"ids": IDS}),
        ((IDS, LABELS), {"ids": TOKEN}, {"ids": IDS, "labels": LABELS}),
        ((IDS, LABELS), TOKEN, (IDS, LABELS)),
        ({"input_ids": IDS}, TOKEN, IDS),
        ({"input_ids": IDS, "labels": LABELS}, TOKEN, (IDS, LABELS)),
        ({"input_ids": IDS, "mask": VALUES}, TOKEN, {"input_ids": IDS, "mask": VALUES.double()}),
        ({"input_ids": IDS}, {"input_ids": TOKEN}, {"input_ids": IDS}),
        ({"input_ids": IDS}, None, {"input_ids": IDS}),
        ((VALUES, VALUES), None, (VALUES.double(), VALUES)),
    ],
)
def test_samples_go_into_the_model_as_it_takes_them(
    given: Any, example: Any, expected: Any
) -> None:
    found = fit_samples(given, nn.Linear(2, 2).double(), example)

    def flat(value: Any) -> dict[Any, Tensor]:
        if isinstance(value, dict):
            return value
        return dict(enumerate(value if isinstance(value, tuple) else (value,)))

    assert type(found) is type(expected)
    assert flat(found).keys() == flat(expected).keys()
    for key, value in flat(expected).items():
        wanted = value.double() if value.is_floating_point() and given is IDS else value
        assert flat(found)[key].dtype == wanted.dtype
        assert torch.equal(flat(found)[key], wanted)


def test_floats_are_no_token_numbers() -> None:
    with pytest.raises(ModelLoadError, match=r"takes token numbers, got torch.float32 \[4, 6\]"):
        fit_samples(VALUES, nn.Linear(2, 2), {"input_ids": TOKEN})


def test_inputs_and_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=VALUES.double().numpy(), labels=LABELS.numpy())
    save_file({"data": VALUES, "labels": LABELS}, tmp_path / "b.safetensors")
    save_file({"images": VALUES, "labels": LABELS}, tmp_path / "c.safetensors")
    for name in ("a.npz", "b.safetensors", "c.safetensors"):
        inputs, labels = load_samples(tmp_path / name)
        assert torch.equal(inputs, VALUES)
        assert labels.dtype == torch.int64
        assert labels.tolist() == LABELS.tolist()
    save_file({"inputs": VALUES, "labels": VALUES.double()}, tmp_path / "d.safetensors")
    assert load_samples(tmp_path / "d.safetensors")[1].dtype == torch.float32


def test_keyword_inputs(tmp_path: Path) -> None:
    ids = torch.arange(8, dtype=torch.int32).reshape(4, 2)
    save_file({"input_ids": ids, "labels": LABELS}, tmp_path / "a.safetensors")
    found = load_samples(tmp_path / "a.safetensors")
    assert isinstance(found, dict)
    assert {key: value.dtype for key, value in found.items()} == {
        "input_ids": torch.int64, "labels": torch.int64
    }  # fmt: skip
    assert torch.equal(found["input_ids"], ids.long())


def test_samples_that_are_none(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", inputs=np.array([{"a": 1}], dtype=object))
    np.save(tmp_path / "flat.npy", np.zeros(5))
    np.save(tmp_path / "text.npy", np.array([["a", "b"]]))
    save_file({"x": torch.ones(2, 2), "y": torch.ones(2)}, tmp_path / "two.safetensors")
    save_file({"labels": torch.ones(2)}, tmp_path / "labels.safetensors")
    np.savez(tmp_path / "uneven.npz", inputs=np.zeros((3, 2)), labels=np.zeros(2))
    save_file({"input_ids": torch.ones(2, 2), "mask": torch.ones(3, 2)}, tmp_path / "ids.st")
    (tmp_path / "noise.npy").write_bytes(b"no array")
    for name, message in (
        ("absent.npy", "there is no file"),
        ("objects.npy", "cannot be read"),
        ("objects.npz", "cannot be read"),
        ("text.npy", "cannot be read"),
        ("noise.npy", "cannot be read"),
        ("flat.npy", r"must hold numbers \[n, ...\], got torch.float64 \[5\]"),
        ("two.safetensors", "holds 2 tensors and none is named 'inputs'"),
        ("labels.safetensors", "holds 1 tensors and none is named 'inputs'"),
        ("uneven.npz", "must hold as many of each, got inputs 3, labels 2"),
        ("ids.st", "must hold as many of each, got input_ids 2, mask 3"),
    ):
        with pytest.raises(ModelLoadError, match=f"^data: .*{message}"):
            load_samples(tmp_path / name)
