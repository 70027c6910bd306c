"""`paikern bench compare`: what changed between two results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.compare_results import changes, key_of, load, main
from bench.timing import write_results

Capture = pytest.CaptureFixture[str]
RESULTS = Path(__file__).parents[2] / "bench" / "results"


def row(method: str = "npb", seconds: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "model": "resnet20", "sparsity": 0.9, "seconds": seconds,
        "reference_seconds": 5.0, "ratio": 5.0, **more,
    }  # fmt: skip


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    return str(write_results(name, rows, threads=2, seeds=[0], folder=folder))


def test_the_same_file(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path, "a", [row(), row("phew")])
    assert main([path, path]) == 0
    assert "2 rows, 0 worse" in capsys.readouterr().out


def test_slower_is_worse_and_faster_is_not(tmp_path: Path, capsys: Capture) -> None:
    old = written(tmp_path, "old", [row(), row("phew")])
    new = written(tmp_path, "new", [row(seconds=1.5), row("phew", seconds=0.5)])
    assert main([old, new]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "slower, 1.50x" in out
    assert "faster, 2.00x" in out
    assert "2 rows, 1 worse" in out
    assert main([old, new, "--tolerance", "0.6"]) == 0


@pytest.mark.parametrize(("seconds", "bad"), [(1.0999, False), (1.1001, True), (0.5, False)])
def test_the_tolerance(seconds: float, bad: bool) -> None:
    (change,) = changes([row()], [row(seconds=seconds)], 0.1)
    assert change.bad is bad


def test_another_mask_is_seen() -> None:
    (change,) = changes([row(kept=100)], [row(kept=101)], 0.1)
    assert change.bad
    assert change.verdict == "kept 100 -> 101"
    (change,) = changes([row(status="finished")], [row(status="not finished", seconds=60.0)], 0.1)
    assert change.bad
    assert "finished -> not finished" in change.verdict


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"accuracy": 0.97}, {"accuracy": 0.1}, "accuracy 0.97 -> 0.1"),
        ({"log_paths": 15.0}, {"log_paths": None}, "log_paths 15 -> None"),
        ({"nodes": 400}, {"nodes": 3}, "nodes 400 -> 3"),
        ({"reference_status": "finished"}, {"reference_status": "failed"}, "finished -> failed"),
        ({"kept": 5}, {}, "kept 5 -> missing"),
        ({}, {"seconds": None}, "no time"),
    ],
)
def test_whatever_a_row_found_out_is_compared(
    before: dict[str, Any], after: dict[str, Any], words: str
) -> None:
    (change,) = changes([row() | before], [row() | after], 0.1)
    assert change.bad
    assert words in change.verdict


def test_rounding_and_limits_are_no_change() -> None:
    (change,) = changes([row(log_paths=15.0)], [row(log_paths=15.0 + 1e-9)], 0.1)
    assert not change.bad
    stopped = row(status="not finished")
    (change,) = changes([stopped | {"seconds": 10.0}], [stopped | {"seconds": 60.0}], 0.1)
    assert not change.bad


def test_seeds_are_told_apart_whatever_their_order() -> None:
    rows = [row(seed=0, accuracy=0.9), row(seed=1, accuracy=0.8)]
    assert not any(c.bad for c in changes(rows, rows[::-1], 0.1))


def test_missing_and_new_rows() -> None:
    found = changes([row(), row("phew")], [row(), row("dpai")], 0.1)
    assert [(c.verdict, c.bad) for c in found] == [
        ("same", False), ("missing", True), ("new", False),
    ]  # fmt: skip


def test_rows_of_one_key_are_matched_in_order() -> None:
    found = changes([row(seconds=1.0), row(seconds=2.0)], [row(seconds=1.0), row(seconds=4.0)], 0.1)
    assert [c.bad for c in found] == [False, True]


def test_a_failed_run_has_no_time() -> None:
    (change,) = changes([row(seconds=None)], [row(seconds=None)], 0.1)
    assert not change.bad
    assert change.verdict == "same"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_committed_results_compare_with_themselves(path: Path) -> None:
    rows = load(path)["rows"]
    assert rows
    assert all(key_of(r) for r in rows)
    assert not any(c.bad or c.verdict != "same" for c in changes(rows, rows, 0.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "no results file"),
        (json.dumps({"rows": [], "schema": 99}), "schema 99"),
        (json.dumps({"rows": [1, 2], "schema": 1}), "row 0 is no row"),
        (json.dumps({"rows": [{"seconds": "fast"}], "schema": 1}), "row 0 is no row"),
    ],
)
def test_unreadable_files(
    tmp_path: Path, capsys: Capture, content: str | None, message: str
) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_negative_tolerance(tmp_path: Path, capsys: Capture) -> None:
    path = written(tmp_path, "a", [row()])
    assert main([path, path, "--tolerance", "-1"]) == 2
    assert "--tolerance" in capsys.readouterr().err
