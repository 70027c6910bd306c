"""`paikern inspect`, `verify` and `report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import paikern as pk
from paikern.cli import main
from paikern.masks import MaskSet
from python_tests.cli.helpers import Capture, refused


def test_inspect_shows_layers_totals_and_provenance(capsys: Capture, folder: Path) -> None:
    assert main(["inspect", str(folder / "masks.safetensors")]) == 0
    out = capsys.readouterr().out
    for text in ("kept 26,620 of 266,200", "layers.1.weight", "300 x 784", "method", "magnitude"):
        assert text in out
    assert main(["inspect", str(folder / "masks.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["sparsity"] == 0.9


def test_inspect_escapes_control_characters(capsys: Capture, tmp_path: Path) -> None:
    name = "evil\x1b]0;title\x07"
    masks = MaskSet({name: torch.tensor([3], dtype=torch.uint8)}, {name: (2,)}, {"method": name})
    masks.save(tmp_path / "m.safetensors")
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "evil\\x1b]0;title\\x07" in out


def test_verify_passes(capsys: Capture, folder: Path) -> None:
    argv = ["verify", str(folder / "masks.safetensors"), "--model", "lenet300"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "not checked, needs --checkpoint" in out
    assert err == ""
    assert main([*argv, "--checkpoint", str(folder / "model.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert [check["ok"] for check in found["checks"]] == [True] * 4


def test_verify_finds_weights_that_came_back(capsys: Capture, folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    masks = pk.load_masks(folder / "masks.safetensors")
    pruned = torch.nonzero(~masks["layers.3.weight"])[:3]
    state["layers.3.weight"][tuple(pruned.T)] = 0.5
    save_file(state, tmp_path / "w.safetensors")
    argv = ["verify", str(folder / "masks.safetensors"), "--model", "lenet300"]
    assert main([*argv, "--checkpoint", str(tmp_path / "w.safetensors")]) == 1
    err = capsys.readouterr().err.strip()
    assert err.count("\n") == 0
    assert "layers.3.weight has 3 pruned weights that are not 0" in err


def test_verify_finds_dead_layers_and_wrong_counts(capsys: Capture, tmp_path: Path) -> None:
    model = pk.zoo.create("lenet300", seed=0)
    masks = pk.prune(model, "magnitude", sparsity=0.9, apply=False)
    bools = {name: masks[name] for name in masks}
    bools["layers.5.weight"] = torch.zeros_like(bools["layers.5.weight"])
    MaskSet.from_bool(bools, masks.metadata).save(tmp_path / "m.safetensors")
    assert main(["verify", str(tmp_path / "m.safetensors"), "--model", "lenet300", "--json"]) == 1
    out, err = capsys.readouterr()
    failed = {c["check"] for c in json.loads(out)["checks"] if c["ok"] is False}
    assert failed == {"number of kept weights", "a path from input to output", "no dead layer"}
    assert len(err.strip().splitlines()) == 3
    assert "but sparsity 0.9 keeps 26,620" in err


def test_verify_does_not_blame_masks_for_layers_that_the_model_does_not_use(
    capsys: Capture, module: Callable[[str], str], tmp_path: Path
) -> None:
    name = module(
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return self.used(x)\n"
        "def build():\n    return Odd(), torch.ones(1, 4)\n"
    )
    argv = ["--model", f"{name}:build"]
    prune = ["prune", *argv, "--method", "random", "--sparsity", "0.5", "--out", str(tmp_path)]
    assert main([*prune, "--quiet"]) == 0
    assert main(["verify", str(tmp_path / "masks.safetensors"), *argv, "--quiet"]) == 0


@pytest.mark.parametrize(
    "metadata",
    [{}, {"sparsity": True}, {"sparsity": "half", "arguments": {}}, {"arguments": [1]}],
)
def test_verify_of_masks_without_provenance(
    metadata: dict[str, object], tmp_path: Path, capsys: Capture
) -> None:
    model = pk.zoo.create("lenet300")
    masks = MaskSet.from_model(model)
    MaskSet.from_bool(dict(masks), metadata).save(tmp_path / "m.safetensors")
    assert main(["verify", str(tmp_path / "m.safetensors"), "--model", "lenet300"]) == 0
    assert "no exact count was asked for" in capsys.readouterr().out


def test_report_next_to_the_masks_or_elsewhere(capsys: Capture, masks_file: Path) -> None:
    argv = ["report", str(masks_file), "--model", "lenet300"]
    assert main(argv) == 0
    assert masks_file.with_suffix(".html").read_text().startswith("<!DOCTYPE html>")
    assert main([*argv, "--out", str(masks_file.parent / "page.html"), "--json"]) == 0
    assert "page.html" in capsys.readouterr().out
    assert "no folder" in refused(capsys, *argv, "--out", str(masks_file.parent / "x" / "p.html"))
