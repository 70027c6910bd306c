"""The tests of the operations, made for the CPU, on tensors of the GPU, once for each backend.

They are those of the CPU suite, of the lane of CUDA sources and of Triton's interpreter: a kernel
that comes with tests there is tested here without a line more.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from paikern.backends import registry

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("moved")]

LANES = ("cuda_source", "triton")
#: About how a lane works, not about what an operation gives.
NOT_HERE = {
    "test_backend", "test_barriers", "test_compile", "test_jit", "test_masked_plan", "test_plan",
    "test_shim",
}  # fmt: skip
#: Of the CPU suite: those that compare an operation with an oracle of their own.
OPERATIONS = (
    "apply_mask", "balanced_mask", "block_means", "dpai_step", "expand_blocks", "kth_largest",
    "nm_mask", "nm_mask_factored", "pack_mask", "path_backward", "path_conv_backward",
    "path_conv_forward", "path_conv_kept", "path_conv_score", "path_forward", "path_score",
    "path_sweep", "phew_walks", "topk_mask", "topk_mask_edges", "topk_mask_factored",
    "topk_mask_maps", "topk_mask_product", "unpack_mask",
)  # fmt: skip
#: Promises of the CPU backend alone: the memory of a run of selections; the order of sums where
#: nothing of the weight is read.
OF_THE_CPU = {
    "test_evenly_spaced_zeros_below_negative_thresholds",
    "test_path_forward_never_reads_what_is_masked",
}
FIXTURES = {"cuda_source", "monkeypatch", "tmp_path"}


def modules() -> Iterator[tuple[str, str]]:
    """Short and full names."""
    for lane in LANES:
        package = importlib.import_module(f"python_tests.{lane}")
        for found in pkgutil.iter_modules(package.__path__):
            if found.name.startswith("test_") and found.name not in NOT_HERE:
                yield f"{lane}_{found.name[5:]}", f"{package.__name__}.{found.name}"
    for operation in OPERATIONS:
        yield f"ops_{operation}", f"python_tests.ops.test_{operation}"


def collected() -> Iterator[tuple[str, Callable[..., None]]]:
    for short, name in modules():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            yield f"test_{short}", _skipped(str(error))
            continue
        for title, function in vars(module).items():
            own = getattr(function, "__module__", None) == name
            if not title.startswith("test_") or not own or title in OF_THE_CPU:
                continue
            if not _foreign(function):
                yield f"test_{short}_{title[5:]}", function


def _foreign(function: Callable[..., None]) -> set[str]:
    """Fixtures that only its own lane has."""
    marks = getattr(function, "pytestmark", [])
    given = {
        name.strip()
        for mark in marks
        if mark.name == "parametrize"
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }
    return set(inspect.signature(function).parameters) - given - FIXTURES


def _skipped(why: str) -> Callable[[], None]:
    def test() -> None:
        pytest.skip(why)

    return test


@pytest.fixture(autouse=True)
def _default(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that name no backend of their own ask for the one under test."""
    module = inspect.getmodule(request.function)
    assert module is not None
    if module.__name__.startswith("python_tests.ops.") or _uses_it(module):
        with registry.using("cuda_source"):
            yield
    else:
        yield


def _uses_it(module: ModuleType) -> bool:
    marks = getattr(module, "pytestmark", [])
    return any(
        mark.name == "usefixtures" and "cuda_source" in mark.args
        for mark in (marks if isinstance(marks, list) else [marks])
    )


globals().update(collected())
