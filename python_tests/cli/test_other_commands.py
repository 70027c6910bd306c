"""Lists, help, and what every command shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paikern as pk
from paikern.cli import main
from python_tests.cli.helpers import PRUNE, Capture, refused

ROOT = Path(__file__).resolve().parents[2]


def test_methods_and_backends(capsys: Capture) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for row in pk.methods():
        assert row["name"] in out
    for row in pk.training.pruner_rows():
        assert row["name"] in out
    assert "data, labels" in out
    lines = out[out.index("during training") :].splitlines()
    needs = {
        "asni": "- ",
        "earlybird_ticket": "inputs (earlybird)",
        "earlycrop_u": "data, labels (crop)",
        "gate_decorators": "data, labels ",
        "one_shot": "- (magnitude)",
    }
    for name, text in needs.items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.removeprefix(name).strip().startswith(text)
    assert "known weakness" in out
    assert main(["methods", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [
        row["name"] for row in pk.methods()
    ]
    assert main(["backends"]) == 0
    assert "reference" in capsys.readouterr().out
    assert main(["backends", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == pk.backends()


def test_bench_passes_its_options_on_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Process:
        waits = 0

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append((command[1:], env["PYTHONPATH"].split(os.pathsep)[0]))

        def wait(self) -> int:
            Process.waits += 1
            if Process.waits == 1:  # Ctrl-C reaches both; the benchmark still writes its page
                raise KeyboardInterrupt
            return 3

    monkeypatch.setattr(subprocess, "Popen", Process)
    assert main(["bench", "--only", "phew", "--help"]) == 3
    assert seen == [(["-m", "bench", "--only", "phew", "--help"], str(ROOT))]
    assert Process.waits == 2


def test_bench_reads_and_writes_where_the_user_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    results = ROOT / "bench" / "results" / "dpai_step.json"
    (tmp_path / "mine.json").write_text(results.read_text())
    assert main(["bench", "compare", "mine.json", "mine.json"]) == 0
    assert "0 worse" in capfd.readouterr().out


def test_bench_outside_the_source_tree(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pk, "__file__", str(tmp_path / "paikern" / "__init__.py"))
    assert "part of the source tree" in refused(capsys, "bench")


@pytest.mark.parametrize("command", ["prune", "inspect", "verify", "report", "methods", "backends"])
def test_help(capsys: Capture, command: str) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: paikern {command}" in capsys.readouterr().out


def test_help_of_prune_and_main_have_examples(capsys: Capture) -> None:
    assert main(["prune", "--help"]) == 0
    assert "examples:\n  paikern prune --model resnet20" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "exit codes: 0 done, 1 a check failed, 2 wrong use" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["inspect"], ["prune"]])
def test_wrong_use(capsys: Capture, argv: list[str]) -> None:
    assert "--help" in refused(capsys, *argv)


def test_debug_shows_the_traceback(capsys: Capture) -> None:
    assert main([*PRUNE, "--sparsity=2", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_are_one_line_with_their_type(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("paikern.api.prune", fail)
    line = refused(capsys, *PRUNE, "--sparsity=.5")
    assert line == "paikern: RuntimeError: first second (--debug shows where)"


def test_tables_on_a_terminal(
    capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["inspect", str(folder / "masks.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "─" in out
    assert "layers.1.weight" in out
    assert "26,620" in out
