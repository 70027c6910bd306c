"""The quality study: rows, resuming, page and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import quality_claims, quality_report, run_quality
from bench.quality_runs import quality_rows
from bench.quality_training import PARTS, Run, model_of, samples
from bench.quality_ways import (
    ASNI_FORMS,
    DENSE,
    NETS,
    STRUCTURED,
    SWEEP,
    TRAINING,
    WAYS,
    fits,
    row_names,
    way_of,
)
from bench.run_quality import earlier, main
from bench.timing import Row, machine, versions
from paikern.errors import PaikernError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FOUND = ("seconds", "train_seconds", "step_ms")


@pytest.mark.parametrize(
    "way", ["random", "dpai, keep_nodes, alpha 0", "px", "npb", "phew", "snip"]
)
def test_a_row(way: str) -> None:
    (row,) = quality_rows("lenet300", way, 0.9, seed=0, epochs=1)
    assert row["kept"] == 26_620
    assert 0 < row["params"] <= row["kept"]
    assert 0 < row["nodes"] <= 410
    assert row["empty_layers"] == 0
    assert row["accuracy"] > 0.3  # ten classes; one epoch of 40 steps
    # 4 bytes a kept weight and a bias, one bit a place, and the header of the file.
    assert 0 < row["disk_bytes"] - 4 * (26_620 + 410) - 266_200 // 8 < 1_000
    (again,) = quality_rows("lenet300", way, 0.9, seed=0, epochs=1)
    assert row == again | {name: row[name] for name in FOUND}


def test_what_is_pruned_during_training_keeps_what_was_asked_for() -> None:
    for way in ("imp", "ltr", "earlycrop_u"):
        (row,) = quality_rows("lenet300", way, 0.98, seed=0, epochs=1)
        assert row["kept"] == 5_324, way
        assert row["accuracy"] > 0.3, way
        assert row["seconds"] > 0, way
    (dense,) = quality_rows("lenet300", DENSE, 0.0, seed=0, epochs=1)
    assert "kept" not in dense


def test_asni_gives_its_three_forms_of_one_mask() -> None:
    rows = quality_rows("lenet300", "asni", 0.98, seed=0, epochs=1)
    assert {row["method"] for row in rows} == set(ASNI_FORMS)
    assert {row["kept"] for row in rows} == {5_324}
    assert len({row["accuracy"] for row in rows}) > 1
    assert {row["settings"] for row in rows} == {WAYS["asni"].settings}


@pytest.mark.parametrize("error", [PaikernError, ValueError, RuntimeError])
def test_a_refusal_is_a_row(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("dead network\nmore")

    monkeypatch.setattr("paikern.prune", refuse)
    (row,) = quality_rows("lenet300", "dpai", 0.98, seed=0, epochs=1)
    assert "accuracy" not in row
    assert row["error"] == f"{error.__name__}: dead network"


def test_a_pruner_is_told_so_many_times() -> None:
    model, _ = model_of("lenet300", 0)
    run = Run("lenet300", model, 0, 1)
    told: list[int] = []

    def count() -> bool:
        told.append(len(run.step_times))
        return False

    assert not run.once(count)
    assert told == [(part + 1) * run.total // PARTS for part in range(PARTS)]


def test_samples_hold_every_digit_alike_and_batches_differ() -> None:
    first, second = samples("lenet300", 2)
    assert first[1].bincount().tolist() == second[1].bincount().tolist() == [10] * 10
    assert not (first[0] == second[0]).all(1).any()


def run(folder: Path, *more: str) -> int:
    return main([
        "--nets", "lenet300", "--sparsity", "0.98", "--seeds", "0", "--epochs", "1", "--no-sweep",
        "--no-counts", "--jobs", "1", "--out", str(folder), *more,
    ])  # fmt: skip


def test_run_page_and_resumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--ways", "magnitude") == 0
    path = tmp_path / "quality.json"
    first = json.loads(path.read_text())
    assert [row["method"] for row in first["rows"]] == [DENSE, "magnitude"]
    assert run(tmp_path, "--ways", "magnitude", "random", "asni") == 0
    second = json.loads(path.read_text())
    assert second["rows"][:2] == first["rows"]
    assert [row["method"] for row in second["rows"][:3]] == [DENSE, "magnitude", "random"]
    page = (tmp_path / "quality.md").read_text()
    for name in ("magnitude", "random", *ASNI_FORMS):
        assert f"| {name} |" in page
    assert "### lenet300, 98%, in the columns of the EarlyCroP slides" in page
    assert "### lenet300, ASNI" in page
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()


def test_rows_of_other_settings_are_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = {name: json.loads(json.dumps(net._asdict())) for name, net in NETS.items()}
    same = {"method": "px", "model": "lenet300", "settings": WAYS["px"].settings}
    sweep = {"op": "sweep", "model": "resnet20", "size": "ascent, alpha 0, beta 0.5"}  # no method
    rows = [
        same, sweep, same | {"settings": "other"}, same | {"error": "refused"},
        same | {"method": "x"},
    ]  # fmt: skip
    held: dict[str, Any] = {
        "machine": machine(), "versions": versions(), "epochs": None, "nets": nets, "rows": rows,
    }  # fmt: skip
    path = tmp_path / "quality.json"
    path.write_text(json.dumps(held))
    assert earlier(path, None) == [same, sweep]
    assert "3 of 5 rows" in capsys.readouterr().err
    assert earlier(path, 1) == []
    path.write_text(json.dumps(held | {"nets": nets | {"lenet300": {"epochs": 1}}}))
    assert earlier(path, None) == [sweep]
    assert earlier(tmp_path / "missing.json", None) == []


def test_a_mistake_in_one_run_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: object) -> list[Row]:
        raise KeyError("layers.1.weight")

    monkeypatch.setattr(run_quality, "quality_rows", wrong)
    rows, mistake = run_quality.attempt(("lenet300", "px", 0.9, 0, 1))
    assert rows == []
    assert "'px'" in mistake
    assert "KeyError: 'layers.1.weight'" in mistake
    assert run_quality.tell([mistake]) == 1
    assert "KeyError" in capsys.readouterr().err
    assert run_quality.tell([]) == 0


def row_of(way: str, seed: int, accuracy: float, **more: Any) -> Row:
    return {
        "method": way, "model": "lenet300", "sparsity": 0.98, "seed": seed, "log_paths": 1.0,
        "accuracy": accuracy, "nodes": 10, "kernels": 1, "params": 1, "kept": 2, "total": 100,
        "empty_layers": 0, "seconds": 1.0, "train_seconds": 2.0, "step_ms": 3.0,
        "disk_bytes": 4000, **more,
    }  # fmt: skip


def page_of(*rows: Row) -> str:
    content = {
        "rows": rows, "machine": {"cpu": "x"}, "versions": {"torch": "1", "paikern": "0"},
        "seeds": [0, 1], "epochs": None,
    }  # fmt: skip
    return quality_report.page(content, "images")


def test_the_best_accuracy_is_marked_and_means_are_means() -> None:
    text = page_of(
        row_of("npb", 0, 0.9), row_of("npb", 1, 0.8, nodes=20), row_of("phew", 0, 0.7, nodes=30)
    )
    assert "| npb | **85.00** | 7.07 | 1.0 | 15 |" in text
    assert "| phew | 70.00 |  | 1.0 | 30 |" in text
    assert "npb 1.0, phew 2.0" in text


def test_masks_without_paths_refusals_and_larger_networks_are_told() -> None:
    row = row_of("npb", 0, 0.9, sparsity=0.5, log_paths=2.0)
    text = page_of(
        row,
        row | {"seed": 1, "log_paths": None},
        row | {"op": "topology", "model": "vgg19_bn", "sparsity": 0.98, "nodes": 5604},
        {"method": "px", "model": "lenet300", "sparsity": 0.5, "seed": 0, "error": "no ReLU"},
        row_of("asni", 0, 0.5, sparsity=0.5, kept=60),
    )
    assert "### lenet300, 50%" in text
    assert "| 2.0 (none: 1 of 2) |" in text
    assert "## vgg19_bn, 98%, not trained" in text
    assert "| npb | 2.0 | 5,604 |" in text
    assert "- px refuses: no ReLU (1 of the seeds)" in text
    assert "- asni keeps more than asked for in 1 of 1 runs: 60.00 % of the weights." in text


def test_columns_of_the_slides_and_of_asni() -> None:
    text = page_of(
        {**row_of(DENSE, 0, 0.95, sparsity=0.0)} | {"kept": 100},
        row_of("snip", 0, 0.8),
        row_of("asni", 0, 0.6),
        row_of("asni, centroids", 0, 0.7),
    )
    assert "| snip | 80.00 | 98.0 | - | 1.00 | 2.0 | 3.0 | 4 |" in text
    assert "| 98 | 2 | 95.00 ± - | 60.00 ± - | 70.00 ± - |  |" in text


def test_emptied_layers_are_listed_at_the_lowest_sparsity() -> None:
    text = page_of(
        row_of("px", 0, 0.5, empty_layers=6, sparsity=0.95),
        row_of("px", 1, 0.5, empty_layers=2, sparsity=0.95),
        row_of("px", 0, 0.1, empty_layers=9, sparsity=0.99, log_paths=None),
        row_of("snip", 0, 0.5),
    )
    section = text.partition("## Where layers are emptied")[2]
    assert "| px | 95%: 6 layers, 99%: no path |" in section
    assert "| snip |" not in section


def test_contradictions_come_from_the_rows() -> None:
    def notes(*means: float) -> list[str]:
        names = ("asni, centroids", "asni, original init")
        rows = [
            row_of(name, seed, value + 0.001 * seed)
            for name, value in zip(names, means, strict=True)
            for seed in (0, 1)
        ]
        return quality_claims.notes(rows, "lenet300", 0.98)

    assert notes(0.8, 0.7) == []
    assert notes(0.7, 0.7005) == []  # within the spread of the seeds
    (line,) = notes(0.7, 0.8)
    assert line.startswith("ASNI, table 2")
    assert "asni, centroids (70.05 here, 96.93 there)" in line
    assert "asni, original init (80.05 here, 96.75 there)" in line
    one_seed = [row_of("dpai", 0, 0.5), row_of("npb", 0, 0.9)]
    assert quality_claims.notes(one_seed, "lenet300", 0.98) == []
    two_seeds = one_seed + [row | {"seed": 1} for row in one_seed]
    (line,) = quality_claims.notes(two_seeds, "lenet300", 0.98)
    assert "dpai (50.00) is behind npb (90.00)" in line


def test_collapse_and_slowness_are_contradictions() -> None:
    rows = [row_of("synflow", 0, 0.5, empty_layers=2), row_of("synflow", 1, 0.5)]
    (line,) = quality_claims.notes(rows, "lenet300", 0.98)
    assert line.endswith("here synflow empties up to 2.")
    times = [row_of("dpai", 0, 0.5, seconds=9.0), row_of("npb", 0, 0.5), row_of("phew", 0, 0.5)]
    (line,) = quality_claims.speed_notes(times)
    assert line.endswith("dpai takes 9.00 s, phew 1.00 s, npb 1.00 s.")
    assert quality_claims.speed_notes([times[0] | {"seconds": 0.5}, *times[1:]]) == []


@pytest.mark.parametrize("wrong", [["--sparsity", "2"], ["--jobs", "0"], ["--epochs", "-1"]])
def test_wrong_use_is_refused_in_one_line(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_every_way_is_a_method_and_every_method_is_run() -> None:
    import paikern as pk
    from paikern.scorers import scorer_class
    from paikern.training.registry import pruner_class

    known = {row["name"]: row["options"] for row in pk.methods()}
    pruners = {row["name"]: row["options"] for row in pk.training.pruner_rows()}
    for name, way in WAYS.items():
        options = pruners if way.family == TRAINING else known
        assert set(way.options) - {"scope", "variant"} <= set(options[way.method]), name
    classes = [*map(scorer_class, known), *map(pruner_class, pruners)]
    ours = {cls.name for cls in classes if cls.__module__.startswith("paikern.")}
    # one_shot is any of the others at another time; gammas that nothing has trained yet are all 1
    assert {way.method for way in WAYS.values()} >= ours - {"one_shot", "earlybird"}
    assert len(SWEEP) == 40
    assert [way_of(name).family for name in ASNI_FORMS] == [TRAINING] * 3
    assert len(set(row_names())) == len(row_names())


def test_methods_of_batch_norm_are_not_run_without_it() -> None:
    assert all(fits("resnet20", way) for way in WAYS)
    without = {name for name in WAYS if not fits("lenet300", name)}
    assert without <= {name for name, way in WAYS.items() if way.family in (STRUCTURED, TRAINING)}
