"""The quality study: rows, resuming, page and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import quality_report
from bench.quality_runs import DENSE, NETS, SWEEP, WAYS, quality_row
from bench.run_quality import main

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("way", ["random", "dpai, keep_nodes, alpha 0", "px", "npb", "phew"])
def test_a_row(way: str) -> None:
    row = quality_row("lenet300", way, 0.9, seed=0, epochs=1)
    assert row["kept"] == 26_620
    assert 0 < row["params"] <= row["kept"]
    assert 0 < row["nodes"] <= 410
    assert row["empty_layers"] == 0
    assert row["accuracy"] > 0.3  # ten classes; one epoch of 40 steps
    assert row == quality_row("lenet300", way, 0.9, seed=0, epochs=1) | {
        name: row[name] for name in ("seconds", "train_seconds")
    }


def test_run_page_and_resumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--nets", "lenet300", "--sparsity", "0.98", "--seeds", "0", "--epochs", "1", "--no-sweep",
        "--no-counts", "--jobs", "1", "--out", str(tmp_path),
    ]  # fmt: skip
    assert main([*given, "--ways", "magnitude"]) == 0
    first = json.loads((tmp_path / "quality.json").read_text())
    assert [row["method"] for row in first["rows"]] == [DENSE, "magnitude"]
    assert main([*given, "--ways", "magnitude", "random"]) == 0
    second = json.loads((tmp_path / "quality.json").read_text())
    assert second["rows"][:2] == first["rows"]
    assert [row["method"] for row in second["rows"]] == [DENSE, "magnitude", "random"]
    page = (tmp_path / "quality.md").read_text()
    assert "| magnitude |" in page
    assert "| random |" in page
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()


def test_the_best_accuracy_is_marked_and_means_are_means() -> None:
    def row(way: str, seed: int, accuracy: float, nodes: int) -> dict[str, object]:
        return {
            "method": way, "model": "lenet300", "sparsity": 0.98, "seed": seed, "log_paths": 1.0,
            "accuracy": accuracy, "nodes": nodes, "kernels": 1, "params": 1, "kept": 1,
            "empty_layers": 0, "seconds": 1.0,
        }  # fmt: skip

    rows = [row("npb", 0, 0.9, 10), row("npb", 1, 0.8, 20), row("phew", 0, 0.7, 30)]
    content = {
        "rows": rows, "machine": {"cpu": "x"}, "versions": {"torch": "1", "paikern": "0"},
        "seeds": [0, 1], "epochs": None,
    }  # fmt: skip
    text = quality_report.page(content, "images")
    assert "| npb | **85.00** | 7.07 | 1.0 | 15 |" in text
    assert "| phew | 70.00 |  | 1.0 | 30 |" in text
    assert "npb 1.0, phew 2.0" in text


def test_masks_without_paths_and_larger_networks_are_told() -> None:
    row = {
        "method": "npb", "model": "lenet300", "sparsity": 0.5, "seed": 0, "log_paths": 2.0,
        "accuracy": 0.9, "nodes": 1, "kernels": 1, "params": 1, "kept": 1, "empty_layers": 0,
        "seconds": 1.0,
    }  # fmt: skip
    counted = row | {"op": "topology", "model": "vgg19_bn", "sparsity": 0.98, "nodes": 5604}
    content = {
        "rows": [row, row | {"seed": 1, "log_paths": None}, counted],
        "machine": {"cpu": "x"}, "versions": {"torch": "1", "paikern": "0"},
        "seeds": [0, 1], "epochs": None,
    }  # fmt: skip
    text = quality_report.page(content, "images")
    assert "### 50.0%" in text
    assert "| 2.0 (none: 1 of 2) |" in text
    assert "## vgg19_bn, 98.0%, not trained" in text
    assert "| npb | 2.0 | 5,604 |" in text


@pytest.mark.parametrize("wrong", [["--sparsity", "2"], ["--jobs", "0"], ["--epochs", "-1"]])
def test_wrong_options(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_every_way_is_a_method() -> None:
    import paikern as pk

    known = {row["name"]: row["options"] for row in pk.methods()}
    for method, options in WAYS.values():
        assert set(options) - {"scope", "variant"} <= set(known[method])
    assert len(SWEEP) == 40
    assert set(NETS) == {"lenet300", "resnet20"}
