"""The kernels in Triton's interpreter: the variable has to be set before triton is imported."""

from __future__ import annotations

import importlib.util
import os

import pytest

from paikern.backends import registry

_WHY = (
    "triton is not installed"
    if importlib.util.find_spec("triton") is None
    else "run with TRITON_INTERPRET=1: the kernels run in Triton's interpreter"
)


def _usable() -> bool:
    wanted = os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and registry.load("triton").module is not None


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("triton") and not _usable():
        pytest.skip(_WHY)
