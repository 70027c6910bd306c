"""The backend "cuda_source": `paikern/backends/cuda*.py` with the CUDA sources run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from paikern.backends import cuda_jit, registry
from python_tests.cuda_source import shim


@pytest.fixture(scope="session")
def on_cpu() -> shim.OnCpu:
    if why := shim.missing():
        pytest.skip(why)
    return shim.OnCpu(shim.build())


@pytest.fixture(scope="package", autouse=True)
def _backend(on_cpu: shim.OnCpu) -> Iterator[None]:
    """Registered for these tests alone; whoever forces "cuda_source" by name gets it."""
    module = cuda_jit.backend(on_cpu)
    registry._LOADERS["cuda_source"] = lambda: registry.Backend(
        module, (), "CUDA sources on the CPU", ("cpu",)
    )
    yield
    del registry._LOADERS["cuda_source"]
    registry.load.cache_clear()
    registry._resolve.cache_clear()


@pytest.fixture
def cuda_source() -> Iterator[None]:
    with registry.using("cuda_source"):
        yield
