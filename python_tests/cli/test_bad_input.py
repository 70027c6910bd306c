"""Wrong use and unreadable input: exit code 2, one line, nothing written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import paikern as pk
from paikern import _maskfile
from python_tests.cli.helpers import PRUNE, Capture, refused


@pytest.mark.parametrize("value", ["1", "1.5", "-0.1", "nan", "inf", "98"])
def test_sparsity_out_of_range(capsys: Capture, value: str, tmp_path: Path) -> None:
    line = refused(capsys, *PRUNE, f"--sparsity={value}", "--out", str(tmp_path / "out"))
    assert line.startswith("paikern: sparsity must be in [0, 1)")
    assert not (tmp_path / "out").exists()


def test_98_percent_is_explained(capsys: Capture) -> None:
    assert "for 98.0 % write 0.98" in refused(capsys, *PRUNE, "--sparsity=98")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "exactly one of sparsity"),
        (("--sparsity=.5", "--density=.5"), "exactly one of sparsity"),
        (("--density=0",), r"density must be in (0, 1]"),
        (("--compression=0.5",), "compression must be"),
        (("--sparsity=abc",), "invalid float value: 'abc'"),
        (("--sparsity=.5", "--rounds=0"), "rounds must be >= 1, got 0"),
        (("--sparsity=.5", "--rounds=1.5"), "invalid int value"),
        (("--sparsity=.5", "--scope=globl"), "invalid choice: 'globl'"),
        (("--sparsity=.5", "--variant=published"), "magnitude has no 'published' variant"),
        (("--sparsity=.5", "--backend=gpu"), "unknown backend 'gpu'"),
        (("--sparsity=.5", "--ignore=layers.9"), "'layers.9' is no parameter or module"),
        (("--sparsity=.5", "--ignore=re:("), "is no regular expression"),
        (("--sparsity=.5", "--ignore=re:.*"), "leaves none"),
        (("--sparsity=.5", "--input=1xa"), "joined by 'x'"),
        (("--sparsity=.5", "--input=1x3"), "could not be traced with inputs"),
        (("--sparsity=.5", "--set=steps"), "expected KEY=VALUE, got 'steps'"),
        (("--sparsity=.5", "--set=steps=3"), "method 'magnitude' has no such option"),
        (("--sparsity=.5", "--save-weights"), "needs --out"),
        (("--sparsity=.5", "--frobnicate"), "unknown arguments: --frobnicate"),
        (("--sparsity=.5", "--checkpoint=absent.pt"), "there is no file absent.pt"),
    ],
)
def test_prune_refuses(capsys: Capture, argv: tuple[str, ...], message: str) -> None:
    assert message in refused(capsys, *PRUNE, *argv)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=many", "steps must be int, got 'many'"),
        ("steps=1.5", "steps must be int, got '1.5'"),
        ("steps=true", "steps must be int, got 'true'"),
        ("alpha=2", "alpha must be in [0, 1], got 2"),
        ("step=3", "did you mean 'steps'?"),
        ("optimizer=sgd", "optimizer must be 'ascent' or 'adam'"),
        ("init_scores=x", "takes tensors and can be set from Python only"),
    ],
)
def test_method_options_are_checked(capsys: Capture, setting: str, message: str) -> None:
    argv = ["prune", "--model", "lenet300", "--method", "dpai", "--sparsity=.5", "--set", setting]
    assert message in refused(capsys, *argv)


def test_option_given_twice(capsys: Capture) -> None:
    argv = ["prune", "--model", "lenet300", "--method", "dpai", "--sparsity=.5"]
    assert "given twice" in refused(capsys, *argv, "--set", "steps=1", "--set", "steps=2")


def test_unknown_method_and_model_suggest_the_nearest(capsys: Capture) -> None:
    argv = ["prune", "--sparsity", "0.5", "--model"]
    assert "did you mean 'dpai'?" in refused(capsys, *argv, "lenet300", "--method", "dpia")
    assert "did you mean 'lenet300'?" in refused(capsys, *argv, "lenet30", "--method", "dpai")


def test_nothing_to_prune(capsys: Capture, module: Callable[[str], str]) -> None:
    name = module("def build():\n    return nn.BatchNorm1d(3), torch.ones(2, 3)\n")
    argv = ["prune", "--model", f"{name}:build", "--method", "random", "--sparsity", "0.5"]
    assert "no Linear, Conv or attention weight to prune" in refused(capsys, *argv)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(capsys: Capture, tmp_path: Path, value: float) -> None:
    state = pk.zoo.create("lenet300").state_dict()
    state["layers.3.weight"][2, 5] = value
    save_file(state, tmp_path / "w.safetensors")
    argv = [*PRUNE, "--sparsity=.5", "--checkpoint", str(tmp_path / "w.safetensors")]
    line = refused(capsys, *argv, "--out", str(tmp_path / "out"))
    assert "layers.3.weight holds 1 NaN or infinite weights" in line
    assert not (tmp_path / "out").exists()


def test_layer_collapse_as_an_error(capsys: Capture) -> None:
    argv = ["prune", "--model", "lenet300", "--method", "synflow", "--rounds", "1"]
    argv += ["--sparsity", "0.9999", "--on-collapse", "raise"]
    assert "layers.3.weight would keep no weight" in refused(capsys, *argv)


def test_out_that_is_a_file(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept as it is")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "--out" in refused(capsys, *PRUNE, "--sparsity=.5", "--out", str(out))
    assert (tmp_path / "file").read_text() == "kept as it is"


def test_a_failed_write_leaves_earlier_results(
    capsys: Capture, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "masks.safetensors").write_bytes((folder / "masks.safetensors").read_bytes())
    before = (tmp_path / "masks.safetensors").read_bytes()

    def fail(source: object, target: object) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", fail)
    line = refused(capsys, *PRUNE, "--sparsity=.5", "--out", str(tmp_path))
    assert "No space left on device" in line
    assert os.listdir(tmp_path) == ["masks.safetensors"]
    assert (tmp_path / "masks.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["inspect", "verify", "report"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "No such file"),
        ("folder", "is no regular file"),
        ("empty", "too short for a mask file"),
        ("truncated", "truncated or altered"),
        ("altered", "digest does not match"),
        ("huge header", "announces a header of"),
        ("huge claim", "truncated or altered"),
        ("text", "not a mask file"),
        ("other tensors", "holds no paikern masks"),
    ],
)
def test_bad_mask_files(
    capsys: Capture, masks_file: Path, command: str, damage: str, message: str
) -> None:
    whole = masks_file.read_bytes()
    if damage == "absent":
        masks_file.unlink()
    elif damage == "folder":
        masks_file.unlink()
        masks_file.mkdir()
    elif damage == "empty":
        masks_file.write_bytes(b"")
    elif damage == "truncated":
        masks_file.write_bytes(whole[:-100])
    elif damage == "altered":
        masks_file.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    elif damage == "huge header":
        masks_file.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    elif damage == "huge claim":
        _claim_huge(masks_file)
    elif damage == "text":
        masks_file.write_text("just some text, longer than eight bytes")
    else:
        save_file({"w": torch.ones(3)}, masks_file)
    model = [] if command == "inspect" else ["--model", "lenet300"]
    line = refused(capsys, command, str(masks_file), *model)
    assert message in line
    assert "masks.safetensors" in line


def _claim_huge(path: Path) -> None:
    """A small file whose header speaks of 2**40 weights."""
    header = {
        "format": _maskfile.FORMAT,
        "format_version": "1",
        "shapes": json.dumps({"w": [1 << 20, 1 << 20]}),
        "digest": "0" * 64,
    }
    header["metadata_digest"] = _maskfile._metadata_digest(header)
    size = 1 << 37
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": header, "w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)


@pytest.mark.parametrize("command", ["verify", "report"])
def test_masks_of_another_model(capsys: Capture, masks_file: Path, command: str) -> None:
    line = refused(capsys, command, str(masks_file), "--model", "resnet20")
    assert "the masks belong to another model" in line
    assert os.listdir(masks_file.parent) == ["masks.safetensors"]
