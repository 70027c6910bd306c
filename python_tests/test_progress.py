"""Progress: the caller's function, a bar on a terminal, log lines otherwise."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

import paikern as pk
from paikern import progress as module
from paikern.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(total: int, **options: Any) -> None:
    with Progress("method", total, "round", **options) as bar:
        for i in range(total):
            bar.update(density=1 / (i + 1))


def test_function_is_called_after_every_round() -> None:
    seen: list[tuple[int, int, dict[str, float]]] = []
    run(3, progress=lambda done, total, values: seen.append((done, total, values)))
    assert seen == [(1, 3, {"density": 1.0}), (2, 3, {"density": 0.5}), (3, 3, {"density": 1 / 3})]


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(4, progress=None)
    assert "method" in terminal.getvalue()
    assert "4" in terminal.getvalue()


def test_bar_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run(4, progress=True)
    assert "method" in stream.getvalue()


def test_log_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, logger="paikern"):
        run(5, progress=None)
    assert caplog.messages == ["method: round 5 of 5: density 0.2"]


def test_log_lines_come_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, logger="paikern"):
        run(7, progress=None)
    assert [m.split(":")[1] for m in caplog.messages] == [
        " round 3 of 7", " round 6 of 7", " round 7 of 7",
    ]  # fmt: skip


@pytest.mark.parametrize("total", [1, 4])
def test_silence(
    total: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with caplog.at_level(logging.INFO, logger="paikern"):
        run(total, progress=False)
    assert stream.getvalue() == ""
    assert caplog.messages == []


def test_the_bar_is_closed_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress("method", 4, "round", True)

    def fail() -> None:
        with progress:
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert progress._bar.disable


def test_prune_reports_rounds_and_steps() -> None:
    model, x = pk.zoo.create("mlp", sizes=(8, 16, 4)), pk.zoo.example_input("mlp")[:, :8]
    seen: list[tuple[int, int, dict[str, float]]] = []
    options: dict[str, Any] = {"example_inputs": x, "apply": False, "sparsity": 0.5}
    pk.prune(model, "synflow", rounds=3, progress=lambda *a: seen.append(a), **options)
    assert [a[:2] for a in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2]["density"] == 0.5
    assert "log_flow" in seen[0][2]
    seen.clear()
    pk.prune(model, "dpai", steps=2, progress=lambda *a: seen.append(a), **options)
    assert [a[:2] for a in seen] == [(1, 2), (2, 2)]
    assert set(seen[0][2]) == {
        "log_paths", "effective_nodes", "effective_kernels", "effective_params",
    }  # fmt: skip


def test_an_error_in_the_callers_function_stops_the_run() -> None:
    model = pk.zoo.create("mlp", sizes=(8, 16, 4))
    before = model.layers[1].weight.clone()

    def fail(done: int, total: int, values: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pk.prune(model, "magnitude", sparsity=0.5, progress=fail)
    assert before.equal(model.layers[1].weight)
