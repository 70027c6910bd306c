from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paikern as pk
from paikern.backends import registry
from paikern.errors import BackendError

ROOT = Path(__file__).parents[2]
MASK = torch.tensor([True, False, True])


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends whose pack_mask runs, in order."""
    called: list[str] = []
    for name in ("cpu", "reference"):
        module = registry.load(name).module
        assert module is not None

        def spied(mask, name=name, original=module.pack_mask):
            called.append(name)
            return original(mask)

        monkeypatch.setattr(module, "pack_mask", spied)
    registry._resolve.cache_clear()
    yield called
    registry._resolve.cache_clear()


def test_backends_lists_every_backend_with_a_reason() -> None:
    rows = {row["name"]: row for row in pk.backends()}
    assert list(rows) == ["cpu", "cuda", "triton", "cuda_jit", "reference"]
    assert rows["cpu"]["usable"]
    assert rows["reference"]["usable"]
    assert all(row["reason"] and "\n" not in row["reason"] for row in rows.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_listed_as_unusable_without_a_gpu() -> None:
    row = next(row for row in pk.backends() if row["name"] == "cuda")
    assert not row["usable"]
    assert "no GPU: " in row["reason"] or "_cuda could not be imported" in row["reason"]
    with pytest.raises(BackendError, match="backend: 'cuda' is not usable here: "):
        registry.using("cuda").__enter__()


def test_native_runs_unless_another_is_asked_for(spy: list[str], monkeypatch) -> None:
    pk.ops.pack_mask(MASK)
    with registry.using("reference"):
        pk.ops.pack_mask(MASK)
        with registry.using(None):
            pk.ops.pack_mask(MASK)
        with registry.using("cpu"):
            pk.ops.pack_mask(MASK)
    pk.ops.pack_mask(MASK)
    monkeypatch.setenv("PAIKERN_BACKEND", "reference")
    pk.ops.pack_mask(MASK)
    with registry.using("cpu"):
        pk.ops.pack_mask(MASK)
    assert spy == ["cpu", "reference", "reference", "cpu", "cpu", "reference", "cpu"]


def test_using_ends_when_the_block_raises() -> None:
    with pytest.raises(KeyError), registry.using("reference"):
        raise KeyError
    assert registry.resolve("pack_mask", "cpu", False).__module__ == "paikern.backends.cpu"


def test_unknown_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "unknown backend 'gpu'; available: cpu, cuda, triton, cuda_jit, reference"
    with pytest.raises(BackendError, match=f"backend: {message}"):
        registry.using("gpu").__enter__()
    monkeypatch.setenv("PAIKERN_BACKEND", "gpu")
    with pytest.raises(BackendError, match=f"PAIKERN_BACKEND: {message}"):
        pk.ops.pack_mask(MASK)


def test_float64_paths_run_on_the_reference_and_cannot_be_forced() -> None:
    weight, x = torch.rand(2, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    assert pk.ops.path_forward(weight, x).dtype == torch.float64
    with registry.using("cpu"):
        with pytest.raises(BackendError, match="'cpu' has no kernel for float64 tensors on cpu"):
            pk.ops.path_forward(weight, x)
        assert pk.ops.kth_largest(weight, 6) == float(weight.min())


def test_backends_serve_their_own_devices() -> None:
    assert registry.resolve("pack_mask", "cuda", False).__module__ in (
        "paikern.backends.cuda",
        "paikern.backends.reference",
    )
    with registry.using("cpu"), pytest.raises(BackendError, match="on cuda; use backend="):
        registry.resolve("pack_mask", "cuda", False)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="apply_mask_: tensors are on cpu and meta"):
        registry.choose("apply_mask_", (torch.ones(8), torch.ones(1, device="meta")))
    with pytest.raises(ValueError, match="topk_mask: tensors are on meta and cpu"):
        registry.choose("topk_mask", ([torch.ones(8, device="meta"), torch.ones(1)], [1]))


def test_works_without_the_native_module() -> None:
    done = python(
        "import sys; sys.modules['paikern._C'] = None\n"
        "import torch, paikern as pk\n"
        "rows = {row['name']: row for row in pk.backends()}\n"
        "assert not rows['cpu']['usable']\n"
        "print(rows['cpu']['reason'])\n"
        "print(pk.ops.pack_mask(torch.tensor([True, False, True])).tolist())\n"
        "print(pk.ops.topk_mask(torch.tensor([1.0, 3.0, 2.0]), 2)[0].tolist())\n"
    )
    assert done.returncode == 0, done.stderr
    reason, packed, kept = done.stdout.splitlines()
    assert "paikern._C could not be imported" in reason
    assert "pip install ." in reason
    assert (packed, kept) == ("[5]", "[6]")


def test_importing_paikern_leaves_cuda_alone() -> None:
    """A process that has touched CUDA cannot fork workers that use it."""
    done = python("import sys, paikern; sys.exit('paikern._cuda' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_instruction_set_must_be_a_known_one() -> None:
    done = python("import paikern as pk; pk.backends()", PAIKERN_CPU_ISA="sse9")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "paikern.errors.BackendError: "
        "PAIKERN_CPU_ISA must be one of portable, avx2, avx512, got 'sse9'"
    )
    done = python("from paikern.backends import cpu; print(cpu.isa())", PAIKERN_CPU_ISA="portable")
    assert done.stdout.strip() == "portable"
