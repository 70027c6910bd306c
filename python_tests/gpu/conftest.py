"""The backends of a GPU, each with a reason where it cannot be used.

With PAIKERN_GPU_TESTS_ON=cpu the CUDA sources on the CPU and Triton's interpreter stand in, so that
these tests can be tried where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from paikern.backends import cuda_jit, registry
from python_tests.cuda_source import shim
from python_tests.gpu.moved import Moved

BACKENDS = ("cuda", "cuda_jit", "triton")
ON = os.environ.get("PAIKERN_GPU_TESTS_ON", "cuda")
#: What the other lanes ask for by name; each of them gets the backend under test.
LANES = ("cuda_source", "triton")


def usable(name: str) -> Any:
    """The module of a backend; skips with the reason where there is none."""
    if ON != "cpu":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that this build of torch can use")
        if registry.load(name).module is None:
            pytest.skip(registry.load(name).reason)
        return registry.load(name).module
    if name == "cuda_jit":
        pytest.skip("has no stand-in on the CPU: the text is that of cuda")
    if name == "cuda":
        if why := shim.missing():
            pytest.skip(why)
        return cuda_jit.backend(shim.OnCpu(shim.build()))
    if registry.load("triton").module is None or ON not in registry.load("triton").asked_for:
        pytest.skip(registry.load("triton").reason)
    return registry.load("triton").module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With PAIKERN_GPU_TESTS_EVERY=n one test of n, so that slow tools come to all modules."""
    every = int(os.environ.get("PAIKERN_GPU_TESTS_EVERY", "1"))
    items[:] = items[::every]


@pytest.fixture(scope="session")
def device() -> str:
    return ON


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a usable backend, on its own device under that name."""
    name = request.param
    module = usable(name)
    if ON == "cpu":
        with replaced({name: registry.Backend(module, (), "stands in", ("cpu",))}):
            yield name
    else:
        yield name


@pytest.fixture(scope="module")
def only(backend: str) -> Iterator[str]:
    """The automatic choice, without the other two: what this backend lacks the reference does."""
    others = {name: registry.Backend(None, (), "left out") for name in BACKENDS if name != backend}
    with replaced(others):
        yield backend


@pytest.fixture(scope="module", params=BACKENDS)
def moved(request: pytest.FixtureRequest) -> Iterator[str]:
    """CPU tensors are moved to a backend's device and back, by whatever name a test asks for it."""
    name = request.param
    stand_in = registry.Backend(Moved(name, usable(name), ON), (), "moved", ("cpu",))  # type: ignore[arg-type]
    with replaced(dict.fromkeys(LANES, stand_in)):
        yield name


class replaced:  # noqa: N801, a context manager
    """Other backends under these names."""

    def __init__(self, others: dict[str, registry.Backend]) -> None:
        self._others = others

    def __enter__(self) -> None:
        self._before = dict(registry._LOADERS)
        for name, other in self._others.items():
            registry._LOADERS[name] = lambda other=other: other
        self._clear()

    def __exit__(self, *error: object) -> None:
        registry._LOADERS.clear()
        registry._LOADERS.update(self._before)
        self._clear()

    def _clear(self) -> None:
        registry.load.cache_clear()
        registry._resolve.cache_clear()


@pytest.fixture
def cuda_source() -> Iterator[None]:
    with registry.using("cuda_source"):
        yield
