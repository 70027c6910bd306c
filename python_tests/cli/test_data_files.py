"""`paikern prune --data`: every kind of file either works or is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import paikern as pk
from paikern.cli import main
from python_tests.cli.helpers import Capture, refused

GENERATOR = torch.Generator().manual_seed(2)
X = torch.rand(10, 784, generator=GENERATOR)
Y = torch.arange(10)
IMAGES = torch.rand(6, 3, 32, 32, generator=GENERATOR)
CLASSES = torch.tensor([0, 3, 9, 1, 2, 3])
Written = Callable[[Path], Any]


def argv(file: Path, method: str = "snip", model: str = "lenet300") -> list[str]:
    given = ["prune", "--model", model, "--method", method, "--sparsity", "0.5"]
    return [*given, "--data", str(file)]


def digest(capsys: Capture, *given: str) -> str:
    capsys.readouterr()
    assert main([*given, "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)["digest"])


@pytest.fixture(scope="module")
def expected() -> str:
    """SNIP on the samples as they are in memory."""
    model = pk.zoo.create("lenet300", seed=0)
    return pk.prune(model, "snip", sparsity=0.5, data=(X, Y), apply=False).digest


def big_endian(value: Tensor) -> Any:
    array = value.numpy()
    return array.astype(array.dtype.newbyteorder(">"))


WORKS: dict[str, Written] = {
    "pair.pt": lambda f: torch.save((X, Y), f),
    "list.pt": lambda f: torch.save([X, Y], f),
    "dict.pt": lambda f: torch.save({"inputs": X, "labels": Y}, f),
    "data.pth": lambda f: torch.save({"data": X, "labels": Y}, f),
    "one name.pt": lambda f: torch.save({"images": X, "labels": Y}, f),
    "old.pt": lambda f: torch.save((X, Y), f, _use_new_zipfile_serialization=False),
    "parameter.pt": lambda f: torch.save((torch.nn.Parameter(X), Y), f),
    "named otherwise.bin": lambda f: torch.save((X, Y), f),
    "double.pt": lambda f: torch.save((X.double(), Y.int()), f),
    "a.npz": lambda f: np.savez(f, inputs=X.numpy(), labels=Y.numpy()),
    "compressed.npz": lambda f: np.savez_compressed(f, x=X.numpy(), labels=Y.numpy()),
    "small labels.npz": lambda f: np.savez(f, x=X.numpy(), labels=Y.numpy().astype(np.uint8)),
    "double.npz": lambda f: np.savez(f, inputs=X.double().numpy(), labels=Y.numpy()),
    "long double.npz": lambda f: np.savez(
        f, x=X.numpy().astype(np.longdouble), labels=Y.numpy()
    ),
    "big endian.npz": lambda f: np.savez(f, inputs=big_endian(X), labels=big_endian(Y)),
    "fortran.npz": lambda f: np.savez(f, x=np.asfortranarray(X.numpy()), labels=Y.numpy()),
    "a.safetensors": lambda f: save_file({"inputs": X, "labels": Y}, f),
    "double.safetensors": lambda f: save_file({"inputs": X.double(), "labels": Y}, f),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_files_of_samples_with_labels(
    name: str, capsys: Capture, tmp_path: Path, expected: str
) -> None:
    WORKS[name](tmp_path / name)
    assert digest(capsys, *argv(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.pt", lambda f: torch.save(X, f)),
        ("a.npy", lambda f: np.save(f, X.numpy())),
        ("double.npy", lambda f: np.save(f, X.double().numpy())),
        ("a.safetensors", lambda f: save_file({"data": X}, f)),
        ("with labels.pt", lambda f: torch.save((X, Y * 1000), f)),
    ],
)
def test_samples_alone(name: str, write: Written, capsys: Capture, tmp_path: Path) -> None:
    write(tmp_path / name)
    model = pk.zoo.create("lenet300", seed=0)
    masks = pk.prune(model, "wanda", sparsity=0.5, data=X, apply=False)
    assert digest(capsys, *argv(tmp_path / name, "wanda")) == masks.digest


@pytest.mark.parametrize("method", ["snip", "grasp", "wanda", "ntk_sap", "px", "snap", "prospr"])
def test_one_sample_only(method: str, capsys: Capture, tmp_path: Path) -> None:
    torch.save((X[:1], Y[:1]), tmp_path / "one.pt")
    given = argv(tmp_path / "one.pt", method)
    if method == "prospr":
        assert "reads 4 batches a round, but there are only 1; pass" in refused(capsys, *given)
        given += ["--set", "batches=1"]
    given += ["--rounds", "2"] if method in ("ntk_sap", "px") else []
    digest(capsys, *given)


def test_one_sample_where_batch_norm_has_none_to_compare_it_with(
    capsys: Capture, tmp_path: Path
) -> None:
    torch.save((IMAGES[:1, :, :4, :4].clone(), CLASSES[:1]), tmp_path / "one.pt")
    line = refused(capsys, *argv(tmp_path / "one.pt", "snip", "resnet20"))
    assert "does not take a batch of torch.float32 [1, 3, 4, 4]" in line
    assert "Expected more than 1 value per channel" in line


def test_integers_that_are_numbers_become_floats(capsys: Capture, tmp_path: Path) -> None:
    values = (X * 10).int()
    np.save(tmp_path / "a.npy", values.numpy().astype(np.int16))
    model = pk.zoo.create("lenet300", seed=0)
    masks = pk.prune(model, "wanda", sparsity=0.5, data=values.float(), apply=False)
    assert digest(capsys, *argv(tmp_path / "a.npy", "wanda")) == masks.digest


@pytest.mark.parametrize("shape", [(10, 784), (10, 28, 28), (6, 3, 32, 32)])
@pytest.mark.parametrize("kind", ["npy", "pt", "safetensors"])
def test_images_of_bytes(
    kind: str, shape: tuple[int, ...], capsys: Capture, tmp_path: Path
) -> None:
    image = torch.full(shape, 255, dtype=torch.uint8)
    file = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(file, image.numpy())
    elif kind == "pt":
        torch.save(image, file)
    else:
        save_file({"inputs": image, "labels": torch.zeros(shape[0])}, file)
    line = refused(capsys, *argv(file, "wanda"))
    assert f"holds bytes {list(shape)}; save the floats" in line
    assert "/ 255" in line


def test_images_with_their_channels_last(capsys: Capture, tmp_path: Path) -> None:
    torch.save((IMAGES.movedim(1, -1), CLASSES), tmp_path / "a.pt")
    for method in ("snip", "wanda", "ntk_sap", "px"):
        line = refused(capsys, *argv(tmp_path / "a.pt", method, "resnet20"))
        assert line.startswith("paikern: data: ")
        assert "[6, 32, 32, 3]" in line or "(32, 32, 3)" in line
    torch.save((IMAGES.to(memory_format=torch.channels_last), CLASSES), tmp_path / "b.pt")
    digest(capsys, *argv(tmp_path / "b.pt", "snip", "resnet20"))  # the layout in memory is free


def test_a_model_of_another_dtype(
    module: Callable[[str], str], capsys: Capture, tmp_path: Path
) -> None:
    name = module("def build():\n    return nn.Linear(784, 10).double(), torch.ones(1, 784)\n")
    torch.save((X, Y), tmp_path / "a.pt")
    for method in ("snip", "wanda", "px"):
        digest(capsys, *argv(tmp_path / "a.pt", method, f"{name}:build"))


TOKENS = torch.randint(0, 50, (4, 6), generator=GENERATOR)
TEXT = (
    "class Text(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n"
    "        self.wte, self.head = nn.Embedding(50, 8), nn.Linear(8, 3)\n"
    "    def forward(self, input_ids, attention_mask=None):\n"
    "        return self.head(self.wte(input_ids).mean(1))\n"
    "IDS = torch.zeros(1, 6, dtype=torch.long)\n"
    "def build():\n    return Text(), IDS\n"
    "def named():\n    return Text(), {'input_ids': IDS}\n"
)


@pytest.mark.parametrize("build", ["build", "named"])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("ids.npy", lambda f: np.save(f, TOKENS.numpy())),
        ("int32.npy", lambda f: np.save(f, TOKENS.int().numpy())),
        ("ids.pt", lambda f: torch.save(TOKENS, f)),
        ("named.safetensors", lambda f: save_file({"input_ids": TOKENS}, f)),
        ("masked.pt", lambda f: torch.save(
            {"input_ids": TOKENS, "attention_mask": torch.ones(4, 6)}, f)),
    ],
)  # fmt: skip
def test_token_numbers(
    name: str, write: Written, build: str, module: Callable[[str], str], capsys: Capture,
    tmp_path: Path,
) -> None:  # fmt: skip
    model = f"{module(TEXT)}:{build}"
    write(tmp_path / name)
    digest(capsys, *argv(tmp_path / name, "wanda", model))
    line = refused(capsys, *argv(tmp_path / name, "snip", model))
    assert f"data: the loss needs labels, which method 'snip' reads, and {tmp_path / name}" in line


def test_token_numbers_with_labels(
    module: Callable[[str], str], capsys: Capture, tmp_path: Path
) -> None:
    model = module(TEXT)
    np.savez(tmp_path / "a.npz", inputs=TOKENS.numpy(), labels=np.arange(4) % 3)
    digest(capsys, *argv(tmp_path / "a.npz", "snip", f"{model}:build"))


def test_a_transformer_takes_its_tokens_by_name(capsys: Capture, tmp_path: Path) -> None:
    torch.save({"input_ids": TOKENS}, tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", TOKENS.numpy())
    found = {digest(capsys, *argv(tmp_path / f, "wanda", "llama-tiny")) for f in ("a.pt", "b.npy")}
    assert len(found) == 1


def test_floats_for_a_model_of_token_numbers(
    module: Callable[[str], str], capsys: Capture, tmp_path: Path
) -> None:
    model = f"{module(TEXT)}:build"
    torch.save(TOKENS.float(), tmp_path / "a.pt")
    assert "the model takes token numbers, got torch.float32 [4, 6]; save integers" in refused(
        capsys, *argv(tmp_path / "a.pt", "wanda", model)
    )
    torch.save({"input_ids": TOKENS.float()}, tmp_path / "b.pt")
    assert "must hold token numbers as input_ids, got torch.float32; save integers" in refused(
        capsys, *argv(tmp_path / "b.pt", "wanda", model)
    )
    torch.save(TOKENS + 50, tmp_path / "c.pt")
    line = refused(capsys, *argv(tmp_path / "c.pt", "wanda", model))
    assert "does not take a batch of torch.int64 [4, 6]: wte (Embedding): index out of" in line


def _bytes(content: bytes) -> Written:
    return lambda f: f.write_bytes(content)


def _cut(write: Written, keep: float) -> Written:
    def cut(file: Path) -> None:
        write(file)
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * keep)])

    return cut


def _claims_much(file: Path) -> None:
    """A .npy file of 200 bytes whose header speaks of 2**50 numbers."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**40}, 1024), }}"
    text = text.ljust(117) + "\n"
    file.write_bytes(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + b"0" * 72
    )


OBJECTS = np.array([[{"a": 1}, None]], dtype=object)
REFUSED: dict[str, tuple[Written, str]] = {
    "absent.npy": (lambda f: None, "there is no file "),
    "folder.npy": (lambda f: f.mkdir(), "is a folder; give a file"),
    "empty.npy": (_bytes(b""), "is empty"),
    "empty.pt": (_bytes(b""), "is empty"),
    "empty.safetensors": (_bytes(b""), "is empty"),
    "noise.npy": (_bytes(b"no array at all"), "it is no .npy, .npz, safetensors or torch.save"),
    "noise.pt": (_bytes(bytes(range(1, 200))), "it is no .npy, .npz, safetensors or torch.save"),
    "noise.npz": (_bytes(b"PK" + b"no archive"), "cannot be read"),
    "noise.safetensors": (_bytes(b"no tensors at all"), "cannot be read"),
    "cut.npy": (_cut(lambda f: np.save(f, X.numpy()), 0.5), "cannot be read"),
    "cut header.npy": (_cut(lambda f: np.save(f, X.numpy()), 0.002), "cannot be read"),
    "cut.npz": (_cut(lambda f: np.savez(f, X.numpy()), 0.5), "cannot be read"),
    "cut.pt": (_cut(lambda f: torch.save((X, Y), f), 0.5), "cannot be read"),
    "cut old.pt": (
        _cut(lambda f: torch.save(X, f, _use_new_zipfile_serialization=False), 0.5),
        "cannot be read",
    ),
    "cut.safetensors": (_cut(lambda f: save_file({"x": X}, f), 0.5), "cannot be read"),
    "huge.npy": (_claims_much, "cannot be read"),
    "huge.safetensors": (_bytes(struct.pack("<Q", 1 << 60) + b"{" * 40), "cannot be read"),
    "objects.npy": (
        lambda f: np.save(f, OBJECTS, allow_pickle=True), "Python objects, which are not unpickled"
    ),
    "objects.npz": (
        lambda f: np.savez(f, inputs=OBJECTS), "Python objects, which are not unpickled"
    ),
    "pickle.npy": (lambda f: f.write_bytes(pickle.dumps(X.numpy())), "is not unpickled; save"),
    "pickle.pt": (lambda f: f.write_bytes(pickle.dumps({"x": open})), "is not unpickled; save"),
    "dataset.pt": (
        lambda f: torch.save(torch.utils.data.TensorDataset(X, Y), f), "is not unpickled; save"
    ),
    "module.pt": (lambda f: torch.save(torch.nn.Linear(2, 2), f), "is not unpickled; save"),
    "number.pt": (lambda f: torch.save(3, f), "holds a int; save a tensor, a pair"),
    "three.pt": (lambda f: torch.save((X, Y, Y), f), "holds a tuple; save a tensor, a pair"),
    "batches.pt": (
        lambda f: torch.save([(X, Y), (X, Y)], f), "must hold tensors, 'inputs' is a tuple"
    ),
    "words.pt": (
        lambda f: torch.save({"inputs": X, "labels": ["a"] * 10}, f),
        "must hold tensors, 'labels' is a list",
    ),
    "sparse.pt": (lambda f: torch.save(X.to_sparse(), f), "'inputs' is of another kind"),
    "text.npy": (lambda f: np.save(f, np.array([["a", "b"]])), "as numbers, 'inputs' holds"),
    "text.npz": (
        lambda f: np.savez(f, inputs=X.numpy(), labels=np.array(["cat"] * 10)),
        "as numbers, 'labels' holds str",
    ),
    "dates.npy": (
        lambda f: np.save(f, np.zeros((2, 2), "datetime64[s]")), "as numbers, 'inputs' holds"
    ),
    "records.npy": (
        lambda f: np.save(f, np.zeros((3, 2), [("a", "f4"), ("b", "i4")])), "as numbers"
    ),
    "complex.npy": (
        lambda f: np.save(f, X.numpy() * 1j), "must hold numbers [n, ...], got torch.complex64"
    ),
    "flat.npy": (lambda f: np.save(f, np.zeros(5)), "must hold numbers [n, ...], got torch"),
    "scalar.pt": (lambda f: torch.save(torch.ones(()), f), "must hold numbers [n, ...], got"),
    "no sample.pt": (lambda f: torch.save((X[:0], Y[:0]), f), "holds no sample"),
    "no array.npz": (lambda f: np.savez(f), "holds 0 tensors and none is named 'inputs'"),
    "nothing.pt": (lambda f: torch.save({}, f), "holds 0 tensors and none is named 'inputs'"),
    "keys.npz": (
        lambda f: np.savez(f, a=X.numpy(), b=Y.numpy()),
        "holds 2 tensors and none is named 'inputs' but 'a', 'b'; save",
    ),
    "labels.npz": (
        lambda f: np.savez(f, labels=Y.numpy()),
        "holds 1 tensors and none is named 'inputs' but 'labels'; save",
    ),
    "targets.pt": (
        lambda f: torch.save({"inputs": X, "targets": Y}, f),
        "holds 'targets' beside 'inputs'; save the labels as 'labels'",
    ),
    "short labels.pt": (
        lambda f: torch.save((X, Y[:9]), f), "must hold as many of each, got inputs 10, labels 9"
    ),
    "one label.pt": (
        lambda f: torch.save((X, torch.tensor(1)), f), "as many of each, got inputs 10, labels 0"
    ),
    "no labels.pt": (lambda f: torch.save(X, f), "the loss needs labels, which method 'snip'"),
    "high labels.pt": (
        lambda f: torch.save((X, Y + 1), f),
        "labels run from 1 to 10, but the model has 10 outputs; class numbers start at 0",
    ),
    "low labels.pt": (lambda f: torch.save((X, Y - 1), f), "labels run from -1 to 8, but the"),
    "float labels.pt": (
        lambda f: torch.save((X, Y.float()), f),
        "outputs of shape [10, 10]; class numbers have to be integers, labels.long()",
    ),
    "two labels.pt": (
        lambda f: torch.save((X, torch.stack([Y, Y], 1)), f), "labels of shape [10, 2] do not fit"
    ),
    "nan.pt": (lambda f: torch.save((X / 0, Y), f), "inputs hold NaN or infinite values"),
    "other width.pt": (
        lambda f: torch.save((X[:, :6].clone(), Y), f),
        "the model does not take a batch of torch.float32 [10, 6]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(name: str, capsys: Capture, tmp_path: Path) -> None:
    write, message = REFUSED[name]
    file = tmp_path / name
    write(file)
    before = sorted(os.listdir(tmp_path))
    line = refused(capsys, *argv(file), "--out", str(tmp_path / "out"), "--save-weights")
    assert line.startswith("paikern: data: ")
    assert message in line
    if "label" not in name and name not in ("nan.pt", "other width.pt"):
        assert str(file) in line
    for word in ("numpy.load", "allow_pickle", "weights_only", "WeightsUnpickler"):
        assert word not in line
    assert sorted(os.listdir(tmp_path)) == before


def test_a_pickle_runs_no_code(capsys: Capture, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    for name, write in (
        ("a.npy", lambda f: f.write_bytes(pickle.dumps(Touch()))),
        ("b.pt", lambda f: torch.save(Touch(), f)),
        ("c.npz", lambda f: np.savez(f, inputs=np.array([[Touch()]], dtype=object))),
    ):
        write(tmp_path / name)  # type: ignore[no-untyped-call]
        assert "not unpickled" in refused(capsys, *argv(tmp_path / name))
    assert not (tmp_path / "touched").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(capsys: Capture, tmp_path: Path) -> None:
    torch.save((X, Y), tmp_path / "a.pt")
    (tmp_path / "a.pt").chmod(0)
    assert "cannot be read" in refused(capsys, *argv(tmp_path / "a.pt"))
