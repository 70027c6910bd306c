"""What the tests of the commands share."""

from __future__ import annotations

import pytest

from paikern.cli import main

Capture = pytest.CaptureFixture[str]
PRUNE = ("prune", "--model", "lenet300", "--method", "magnitude")


def refused(capsys: Capture, *argv: str) -> str:
    """Runs a command that must be refused; returns its one line on stderr."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    return err.strip()
