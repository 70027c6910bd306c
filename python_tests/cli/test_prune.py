"""`paikern prune`: what it prints and writes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import paikern as pk
from paikern.cli import main
from python_tests.cli.helpers import PRUNE, Capture, refused


def test_prune_writes_masks_summary_and_page(folder: Path) -> None:
    assert sorted(os.listdir(folder)) == [
        "masks.safetensors",
        "model.safetensors",
        "report.html",
        "summary.json",
    ]
    masks = pk.load_masks(folder / "masks.safetensors")
    assert (masks.kept, masks.total) == (26_620, 266_200)
    assert masks.metadata["model"] == "lenet300"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kept"] == 26_620
    assert summary["digest"] == masks.digest
    assert "magnitude at 90.00 % sparsity" in (folder / "report.html").read_text()


def test_prune_equals_the_library_call(folder: Path) -> None:
    model = pk.zoo.create("lenet300", seed=0)
    masks = pk.prune(model, "magnitude", sparsity=0.9)
    assert masks == pk.load_masks(folder / "masks.safetensors")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_prune_prints_a_row_a_layer(capsys: Capture) -> None:
    assert main([*PRUNE, "--sparsity", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "kept 133,100 of 266,200 weights (50.00 %)" in out
    assert "nothing written; --out DIR keeps the masks" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("layers.")] == list(
        pk.prune(pk.zoo.create("lenet300"), "random", sparsity=0.5)
    )


@pytest.mark.parametrize(
    ("amount", "kept"),
    [("--sparsity=0.75", 66_550), ("--density=0.25", 66_550), ("--compression=4", 66_550)],
)
def test_amounts(capsys: Capture, amount: str, kept: int) -> None:
    assert main([*PRUNE, amount, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == kept


def test_options_reach_the_method(capsys: Capture) -> None:
    argv = ["prune", "--model", "lenet300", "--method", "dpai", "--sparsity", "0.9", "--json"]
    argv += ["--set", "steps=3", "--set", "alpha=0", "--set", "optimizer=adam", "--seed", "7"]
    argv += ["--scope", "local", "--ignore", "layers.5", "--set", "patience=none"]
    assert main(argv) == 0
    about = json.loads(capsys.readouterr().out)["provenance"]
    assert about["seed"] == 7
    expected = {"steps": 3, "alpha": 0.0, "optimizer": "adam", "patience": None, "scope": "local"}
    assert about["arguments"] | expected == about["arguments"]


def test_include_and_rounds(capsys: Capture) -> None:
    argv = ["prune", "--model", "lenet300", "--method", "synflow", "--sparsity", "0.5", "--json"]
    argv += ["--include", "re:layers\\.[13]\\..*", "--rounds", "2", "--schedule", "linear"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["layers"]] == ["layers.1.weight", "layers.3.weight"]
    assert found["provenance"]["arguments"]["rounds"] == 2


def test_progress_lines_where_stderr_is_no_terminal(capsys: Capture) -> None:
    argv = ["prune", "--model", "lenet300", "--method", "synflow", "--sparsity", "0.5"]
    assert main([*argv, "--rounds", "3"]) == 0
    assert "synflow: round 3 of 3" in capsys.readouterr().err
    assert main([*argv, "--rounds", "3", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_warnings_are_lines_and_go_into_the_summary(capsys: Capture, tmp_path: Path) -> None:
    argv = ["prune", "--model", "lenet300", "--method", "synflow", "--rounds", "1"]
    argv += ["--sparsity", "0.9999", "--out", str(tmp_path)]
    assert main(argv) == 0
    line = next(x for x in capsys.readouterr().err.splitlines() if "warning" in x)
    assert line.startswith(
        "paikern: warning: layer collapse: layers.1.weight, layers.3.weight keep"
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert line.endswith(summary["warnings"][0])
    assert summary["log_paths"] is None  # JSON has no infinity
    assert "layer collapse" in (tmp_path / "report.html").read_text()


def test_no_report(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deeper"
    assert main([*PRUNE, "--sparsity", "0.5", "--out", str(out), "--no-report", "--quiet"]) == 0
    assert sorted(os.listdir(out)) == ["masks.safetensors", "summary.json"]


def test_model_without_a_known_input(module: Callable[[str], str], capsys: Capture) -> None:
    name = module("def build():\n    return nn.Linear(6, 4)\n")
    argv = ["prune", "--model", f"{name}:build", "--sparsity", "0.5", "--json", "--method"]
    assert main([*argv, "magnitude"]) == 0
    out, err = capsys.readouterr()
    assert "log_paths" not in json.loads(out)
    assert "no path statistics: the shape of an input is not known; give --input" in err
    assert "needs the shape of an input, for instance --input" in refused(capsys, *argv, "dpai")
    assert main([*argv, "synflow", "--input", "1x6", "--rounds", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["effective_params"] == 12


def test_model_without_path_rules_is_pruned_without_path_statistics(
    module: Callable[[str], str], capsys: Capture
) -> None:
    name = module(
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.w = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return torch.linalg.inv(self.w(x))\n"
        "def build():\n    return Odd(), torch.ones(1, 4, 4)\n"
    )
    argv = ["prune", "--model", f"{name}:build", "--sparsity", "0.5", "--json", "--method"]
    assert main([*argv, "magnitude"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["kept"] == 8
    assert "no path statistics" in err
    assert "register_path_rule" in refused(capsys, *argv, "synflow")


def test_samples_from_a_file(tmp_path: Path, capsys: Capture) -> None:
    samples = torch.randn(12, 784, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "samples.npy", samples.numpy())
    save_file({"data": samples, "labels": torch.zeros(12)}, tmp_path / "samples.safetensors")
    expected = pk.prune(
        pk.zoo.create("lenet300", seed=0), "px", sparsity=0.9, data=samples, rounds=3
    )
    argv = ["prune", "--model", "lenet300", "--method", "px", "--sparsity", "0.9", "--rounds", "3"]
    for name in ("samples.npy", "samples.safetensors"):
        assert main([*argv, "--data", str(tmp_path / name), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["digest"] == expected.digest
    assert "--data: method 'px' reads samples; give --data FILE" in refused(capsys, *argv)
    given = ["--sparsity", "0.9", "--data", str(tmp_path / "samples.npy")]
    assert "--data: method 'magnitude' reads no samples" in refused(capsys, *PRUNE, *given)


def test_samples_with_labels(tmp_path: Path, capsys: Capture) -> None:
    samples = torch.randn(12, 784, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 10
    file = tmp_path / "samples.npz"
    np.savez(file, inputs=samples.numpy(), labels=labels.numpy())
    argv = ["prune", "--model", "lenet300", "--sparsity", "0.5", "--json", "--data", str(file)]
    digests = set()
    for loss in ("cross_entropy", "nll_logits"):
        model = pk.zoo.create("lenet300", seed=0)
        expected = pk.prune(model, "snip", sparsity=0.5, data=(samples, labels), loss_fn=loss)
        assert main([*argv, "--method", "snip", "--loss", loss]) == 0
        digests.add(expected.digest)
        assert json.loads(capsys.readouterr().out)["digest"] == expected.digest
    assert len(digests) == 2
    assert main([*argv, "--method", "px", "--rounds", "2"]) == 0  # reads no labels
    capsys.readouterr()
    assert "--loss: method 'px' differentiates no loss" in refused(
        capsys, *argv, "--method", "px", "--loss", "mse"
    )
    np.save(tmp_path / "inputs.npy", samples.numpy())
    argv[-1] = str(tmp_path / "inputs.npy")
    assert "data: the loss needs labels" in refused(capsys, *argv, "--method", "grasp")


def test_masks_of_a_random_count_are_verified(tmp_path: Path, capsys: Capture) -> None:
    argv = ["--model", "lenet300", "--method", "random_u", "--sparsity", "0.9", "--quiet"]
    assert main(["prune", *argv, "--out", str(tmp_path), "--save-weights", "--no-report"]) == 0
    given = ["--model", "lenet300", "--checkpoint", str(tmp_path / "model.safetensors")]
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "masks.safetensors"), *given]) == 0
    assert "no exact count was asked for" in capsys.readouterr().out


def test_samples_tell_the_shape_of_an_input(
    module: Callable[[str], str], tmp_path: Path, capsys: Capture
) -> None:
    name = module(
        "def build():\n    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))\n"
    )
    np.save(tmp_path / "samples.npy", np.ones((3, 6), dtype=np.float16))
    argv = ["prune", "--model", f"{name}:build", "--method", "px", "--sparsity", "0.3", "--json"]
    assert main([*argv, "--data", str(tmp_path / "samples.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 63
