"""The Triton backend among the others: when it is chosen, what it says, what is compiled."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paikern.backends import reference, registry
from paikern.errors import BackendError

ROOT = Path(__file__).parents[2]


def _python(code: str, **variables: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**env, **variables}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.triton
def test_every_operation_of_the_reference_is_there() -> None:
    module = registry.load("triton").module
    for name in reference.__all__:
        wanted = list(inspect.signature(getattr(reference, name)).parameters)
        assert list(inspect.signature(getattr(module, name)).parameters) == wanted, name


@pytest.mark.triton
def test_cpu_tensors_are_served_only_where_asked_for() -> None:
    assert registry.resolve("pack_mask", "cpu", False).__module__ == "paikern.backends.cpu"
    with registry.using("triton"):
        function = registry.resolve("pack_mask", "cpu", False)
        assert function.__module__ == "paikern.backends.triton.bits"
        with pytest.raises(BackendError, match="has no kernel for float64 tensors on cpu"):
            registry.resolve("path_forward", "cpu", True)


@pytest.mark.triton
def test_every_kernel_is_compiled_ahead_of_time() -> None:
    import importlib
    import pkgutil

    from paikern.backends import triton as backend
    from paikern.backends.triton import builds

    kernels = set()
    for found in pkgutil.iter_modules(backend.__path__):
        module = importlib.import_module(f"{backend.__name__}.{found.name}")
        kernels |= {name for name in vars(module) if name.endswith("_kernel")}
    for row in ("cuda", "hip"):
        listed = builds.builds(row)
        assert {build.kernel.fn.__name__ for build in listed} == kernels
        assert len({build.name for build in listed}) > len(kernels)
        for build in listed:
            assert list(build.signature) == list(inspect.signature(build.kernel.fn).parameters)


def test_importing_paikern_does_not_import_triton() -> None:
    code = (
        "import sys, torch\nbefore = 'triton' in sys.modules\nimport paikern as pk\n"
        "pk.ops.pack_mask(torch.ones(3, dtype=torch.bool))\n"
        "print(before or 'triton' not in sys.modules)"
    )
    assert _python(code).strip() == "True"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_gpu_or_triton_the_reason_is_told() -> None:
    code = (
        "import sys\n{}import paikern as pk\n"
        "print([r['reason'] for r in pk.backends() if r['name'] == 'triton'][0])"
    )
    missing = "sys.modules['triton'] = None\n"
    assert "triton could not be imported" in _python(code.format(missing))
    said = _python(code.format(""))
    assert "TRITON_INTERPRET=1" in said or "triton could not be imported" in said
