"""The comparison: its workers, its rows and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import comparison_report
from bench.comparison_cases import OURS, REFERENCE, Effort
from bench.comparison_rows import shown_ratio
from bench.comparison_worker import Order, Worker
from bench.run_comparison import FULL, QUICK, main, ratio_of

EFFORT = Effort(2, 2)


def order(who: str, method: str = "synflow", effort: Effort = EFFORT, judge: bool = True) -> Order:
    return Order(who, method, "lenet300", 0.9, effort, judge)


@pytest.mark.parametrize("who", [OURS, REFERENCE])
def test_a_worker_runs_and_judges(who: str) -> None:
    with Worker(1) as worker:
        found = worker.run(order(who), limit=60.0)
        again = worker.run(order(who, judge=False), limit=60.0)
    assert found.status == again.status == "finished"
    assert found.kept == 26_620
    assert found.weights == 266_200
    assert found.seconds > 0
    assert found.log_paths is not None
    assert again.kept is None


def test_a_run_past_its_limit_is_stopped_and_the_next_one_starts_afresh() -> None:
    with Worker(1) as worker:
        slow = worker.run(order(REFERENCE, effort=Effort(2, 1_000_000)), limit=2.0)
        assert slow.status == "not finished"
        assert slow.seconds == 2.0
        assert 0 < slow.done < slow.total == 1_000_000
        assert worker.run(order(REFERENCE), limit=60.0).status == "finished"


def test_a_failing_run_says_why() -> None:
    with Worker(1) as worker:
        found = worker.run(order(OURS, effort=Effort(2, 0)), limit=60.0)
    assert found.status == "failed"
    assert "rounds must be >= 1" in found.reason


def test_results_page_and_picture(tmp_path: Path) -> None:
    given = ["--only", "synflow", "--model", "lenet300", "--sparsity", "0.9", "--limit", "0.7"]
    assert main([*given, "--repeats", "1", "--threads", "1", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "comparison.json").read_text())
    (row,) = content["rows"]
    assert (row["method"], row["model"], row["sparsity"]) == ("synflow", "lenet300", 0.9)
    assert row["effort"] == QUICK.effort.synflow_rounds
    assert row["limit"] == 0.7
    if row["reference_status"] == "not finished":
        assert row["reference_seconds"] == 0.7
        assert row["reference_done"] < row["reference_total"] == 100
    # A resumed run measures what is missing and keeps what is there.
    assert (
        main([*given, "--repeats", "1", "--threads", "1", "--out", str(tmp_path), "--resume"]) == 0
    )
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"] == [row]
    page = (tmp_path / "comparison.md").read_text()
    assert "| synflow (100) | lenet300 | 90.0% |" in page
    assert "comparison.png" in page
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_the_page_names_losses_and_failures() -> None:
    row = {
        "method": "npb", "model": "gpt2", "sparsity": 0.98, "effort": None, "ratio": 0.5,
        "log_paths": None, "reference_log_paths": 3.0, "kept": 5, "reference_kept": 5,
        "peak_bytes": 2**20, "reference_peak_bytes": 2**21, "seconds": 2.0, "status": "finished",
        "reference_seconds": 1.0, "reference_status": "finished",
    }  # fmt: skip
    failed = row | {
        "ratio": None, "reference_status": "failed", "reference_reason": "TypeError: no",
    }  # fmt: skip
    content = {
        "machine": {"cpu": "x"}, "versions": {"torch": "1", "python": "3", "paikern": "0"},
        "threads": 2, "seeds": [0], "rows": [row, failed],
    }  # fmt: skip
    text = comparison_report.page(content, "x.png")
    assert "- npb, gpt2, 98.0%: 0.50x" in text
    assert "reference, npb, gpt2: TypeError: no" in text


def test_a_stopped_loop_is_compared_step_by_step() -> None:
    row = {
        "method": "dpai", "effort": 300, "ratio": 0.7, "seconds": 45.0, "status": "finished",
        "reference_seconds": 30.0, "reference_status": "not finished", "reference_done": 10,
        "reference_total": 300,
    }  # fmt: skip
    assert shown_ratio(row) == (pytest.approx(3.0 / 0.15), "a step")
    assert shown_ratio(row | {"effort": None}) == (0.7, ">")
    assert shown_ratio(row | {"reference_status": "finished"}) == (0.7, "")
    assert shown_ratio(row | {"ratio": None}) is None


def test_only_like_is_set_against_like() -> None:
    row = {
        "status": "finished", "seconds": 2.0, "weights": 100, "reference_status": "finished",
        "reference_seconds": 6.0, "reference_weights": 100,
    }  # fmt: skip
    assert ratio_of(row) == 3.0
    assert ratio_of(row | {"reference_weights": 90}) is None
    assert ratio_of(row | {"status": "not finished"}) is None
    assert ratio_of(row | {"reference_status": "failed", "reference_seconds": None}) is None


def test_the_full_comparison_covers_what_it_promises() -> None:
    models = {model for _, model, _ in FULL.cells()}
    assert models == {
        "lenet300", "resnet20", "vgg19_bn", "resnet18@64", "resnet50@224", "vit_b_16", "gpt2",
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [["--sparsity", "1"], ["--limit", "0"], ["--repeats", "0"], ["--only", "nothing"]]
)
def test_wrong_options(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert wrong[0] in capsys.readouterr().err
