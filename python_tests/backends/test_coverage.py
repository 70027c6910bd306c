"""Every operation has a kernel in every GPU backend, and tests that name it there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import paikern as pk
from paikern.backends import cuda, reference
from paikern.ops import maps

ROOT = Path(__file__).parents[2]
TRITON = ROOT / "paikern/backends/triton/__init__.py"
OPERATIONS = sorted(
    {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("paikern::")
    }
)
LANES = {"cuda": "cuda_source", "triton": "triton"}
DERIVATIVES = {  # reached through autograd alone
    "masked_conv2d_input",
    "masked_conv2d_kept",
    "masked_linear_input",
    "masked_linear_kept",
}
MAPS = ("map_maximum", "map_scale_", "live_nodes", "through_maximum_")
ON_GPU = [(backend, name) for backend in LANES for name in (*OPERATIONS, *MAPS)]


def listed(path: Path) -> set[str]:
    """`__all__` of a module, without importing it: triton reads its settings when it is."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{path} has no __all__")


def test_there_are_operations() -> None:
    assert len(OPERATIONS) > 20
    assert {"topk_mask", "path_forward", "dpai_step_", "balanced_mask"} <= set(OPERATIONS)
    public = {name.rstrip("_") for name in dir(pk.ops) if not name.startswith("_")}
    assert {name.rstrip("_") for name in OPERATIONS} - DERIVATIVES <= public
    assert maps.map_maximum(torch.tensor([1.0])) == 1.0


@pytest.mark.parametrize("operation", [*OPERATIONS, *MAPS])
def test_the_reference_has_it(operation: str) -> None:
    assert hasattr(reference, operation)


@pytest.mark.parametrize(("backend", "operation"), ON_GPU)
def test_every_backend_has_it(backend: str, operation: str) -> None:
    names = cuda.__all__ if backend == "cuda" else listed(TRITON)
    assert operation in names


@pytest.mark.parametrize(("backend", "operation"), ON_GPU)
def test_every_lane_tests_it(backend: str, operation: str) -> None:
    texts = [path.read_text() for path in (ROOT / "python_tests" / LANES[backend]).glob("*.py")]
    if any("python_tests.ops.walk_cases" in text for text in texts):
        texts.append((ROOT / "python_tests/ops/walk_cases.py").read_text())
    assert any(operation.rstrip("_") in text for text in texts)
