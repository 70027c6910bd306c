"""What `make prune` runs, on few steps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import paikern as pk
from paikern import demo

_EXPECTED_KEPT = 5418


@pytest.fixture(scope="module")
def results() -> list[demo.Result]:
    found = demo.run(["magnitude", "random"])
    return [*found, *demo.run(["dpai"], steps=3), *demo.run(["synflow"], rounds=2)]


def test_every_method_keeps_the_same_number(results: list[demo.Result]) -> None:
    assert [r.method for r in results] == ["magnitude", "random", "dpai", "synflow"]
    assert {r.masks.kept for r in results} == {_EXPECTED_KEPT}
    assert {r.masks.total for r in results} == {270_896}
    assert all(r.seconds > 0 for r in results)


def test_run_is_reproducible(results: list[demo.Result]) -> None:
    assert demo.run(["random"])[0].masks == results[1].masks


def test_warnings_are_kept_with_their_method(results: list[demo.Result]) -> None:
    by_method = {r.method: r for r in results}
    assert by_method["random"].warnings == ()
    empty = [n for n, kept in by_method["synflow"].masks.kept_by_layer.items() if kept == 0]
    told = " ".join(by_method["synflow"].warnings)
    assert all(name in told for name in empty)


def test_table_has_a_row_a_method(results: list[demo.Result]) -> None:
    table = demo.comparison_table(results)
    assert [row[0] for row in table.rows] == ["magnitude", "random", "dpai", "synflow"]
    assert {row[-2:] for row in table.rows} == {("5,418", "270,896")}
    assert "effective nodes of 794" in [column.title for column in table.columns]


def test_files(results: list[demo.Result], tmp_path: Path) -> None:
    demo.write(results, tmp_path / "out")
    files = sorted(os.listdir(tmp_path / "out"))
    assert {"index.html", "summary.json", "summary.md", "summary.txt", "comparison.png"} <= set(
        files
    )
    assert not [name for name in files if name.endswith(".tmp")]
    for r in results:
        assert pk.load_masks(tmp_path / "out" / f"{r.method}.safetensors") == r.masks
        # `bench.train_demo` finds the masks of a method by this pattern, and wants one of each.
        assert len(list((tmp_path / "out").rglob(f"*{r.method}*.safetensors"))) == 1
        assert (tmp_path / "out" / f"{r.method}.html").stat().st_size > 10_000
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["method"] for row in summary["rows"]] == [r.method for r in results]
    assert summary["rows"][0]["effective_nodes"] == results[0].topology.effective_nodes
    assert (tmp_path / "out" / "comparison.png").stat().st_size < 150_000
    index = (tmp_path / "out" / "index.html").read_text()
    assert "src=" not in index
    assert "<script" not in index
    assert index.count("<svg") == 1 + 2 + 4  # comparison, two runs with a history, four masks


def test_main_refuses_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file")]) == 2
    assert demo.main(["--out", str(tmp_path / "out"), "--sparsity", "1.5", "--quiet"]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 2
    assert "sparsity must be in [0, 1)" in err[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_main(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    for method in demo.METHODS:
        assert f"\n{method} " in out
        assert f"{method} on resnet20 at 98 %" in err
    assert "index.html" in out
