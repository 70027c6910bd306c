"""Callbacks of trainers where the trainer cannot be imported, and what an import costs."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from paikern.training.trainer_data import callback_class


def broken(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fails)


@pytest.mark.parametrize(
    "packages", [("lightning.pytorch", "pytorch_lightning"), ("transformers",)]
)
@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (
            RuntimeError("operator torchvision::nms does not exist\nmore"),
            "cannot be imported (RuntimeError: operator torchvision::nms does not exist)",
        ),
        (
            ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics"),
            "cannot be imported (ModuleNotFoundError: No module named 'torchmetrics')",
        ),
        (OSError(), "cannot be imported (OSError: no message)"),
    ],
    ids=["a library beside it", "a module of its own", "no message"],
)
def test_a_broken_package_is_told_with_its_reason(
    packages: tuple[str, ...], error: Exception, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, error)
    assert callback_class("Callback", *packages) == (object, wrong)


def test_a_package_that_is_not_there() -> None:
    assert callback_class("Callback", "no_such_package.part", "nor_this") == (
        object, "is not installed",
    )  # fmt: skip
    assert callback_class("OrderedDict", "no_such_package", "collections")[1] == ""


SCRIPT = """
import importlib, sys
import paikern.training
real = importlib.import_module
def fails(name, *more):
    if name.split(".")[0] in ("lightning", "pytorch_lightning", "transformers"):
        raise RuntimeError("operator torchvision::nms does not exist")
    return real(name, *more)
importlib.import_module = fails
module = real("paikern.training.{module}")
try:
    module.{name}("asni", sparsity=0.5)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("lightning", "LightningPruner", "Lightning"), ("huggingface", "HFPruner", "transformers")],
)
def test_the_import_passes_and_the_callback_says_why(module: str, name: str, package: str) -> None:
    script = SCRIPT.format(module=module, name=name)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        f"{name} needs {package}, which cannot be imported (RuntimeError: operator torchvision::nms"
    )


def test_training_alone_imports_no_trainer() -> None:
    script = (
        "import sys, paikern.training; print(sorted({'lightning', 'pytorch_lightning', "
        "'transformers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
