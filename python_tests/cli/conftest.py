"""A pruned LeNet-300-100, and how a refusal looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paikern.cli import main
from python_tests.cli.helpers import PRUNE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-300-100 at 90 %, with everything that `prune` writes."""
    out = tmp_path_factory.mktemp("run") / "out"
    argv = [*PRUNE, "--sparsity", "0.9", "--out", str(out), "--save-weights", "--quiet"]
    assert main(argv) == 0
    return out


@pytest.fixture
def masks_file(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "masks.safetensors"
    path.write_bytes((folder / "masks.safetensors").read_bytes())
    return path


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module and returns its name."""
    name = "paikern_cli_models"
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        Path(f"{name}.py").write_text("import torch\nfrom torch import nn\n" + text)
        return name

    sys.modules.pop(name, None)
    yield write
    sys.modules.pop(name, None)
