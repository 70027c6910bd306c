"""Samples from a file: inputs, labels, keyword inputs, and what is none of these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from paikern.loading import ModelLoadError
from paikern.samples import load_samples

VALUES = torch.arange(24.0).reshape(4, 6)
LABELS = torch.tensor([0, 2, 1, 0], dtype=torch.int32)


def test_inputs_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES.double().numpy())
    save_file({"x": VALUES.half()}, tmp_path / "b.safetensors")
    save_file({"x": VALUES[:1].clone(), "data": VALUES}, tmp_path / "c.bin")
    np.savez(tmp_path / "d.npz", VALUES.numpy().astype(np.uint8))
    np.savez_compressed(tmp_path / "e.npz", inputs=VALUES.numpy())
    for name in ("a.npy", "b.safetensors", "c.bin", "d.npz", "e.npz"):
        found = load_samples(tmp_path / name)
        assert isinstance(found, Tensor)
        assert found.dtype == torch.float32
        assert torch.equal(found, VALUES)


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
