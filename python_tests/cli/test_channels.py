"""The command line on masks by channels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import paikern as pk
from paikern.cli import main


def test_prune_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = str(tmp_path / "out"), ["--model", "lenet300"]
    chosen = ["--method", "l1_filters", "--sparsity", "0.5"]
    assert main(["prune", *model, *chosen, "--out", out]) == 0
    assert "channels: 50.00 % of the outputs removed" in capsys.readouterr().out
    file = f"{out}/masks.safetensors"
    assert main(["inspect", file]) == 0
    assert "of 2 layers" in capsys.readouterr().out
    assert main(["inspect", file, "--json"]) == 0
    shown = [json.loads(capsys.readouterr().out), json.loads(Path(out, "summary.json").read_text())]
    for found in shown:
        assert found["node_sparsity"] == 0.5
        assert found["sparsity"] == 1 - found["kept"] / found["total"] > 0.5
    assert main(["verify", file, *model]) == 0


def test_verify_finds_weights_of_removed_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = pk.zoo.create("lenet300")
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=torch.ones(1, 784))
    grown = {name: torch.ones_like(mask) for name, mask in masks.items()}
    pk.MaskSet.from_bool(grown, masks.metadata).save(tmp_path / "grown.safetensors")
    masks.save(tmp_path / "masks.safetensors")
    assert main(["verify", str(tmp_path / "masks.safetensors"), "--model", "lenet300"]) == 0
    assert main(["verify", str(tmp_path / "grown.safetensors"), "--model", "lenet300"]) == 1
    assert "removed ones of layers.1.weight" in capsys.readouterr().err
