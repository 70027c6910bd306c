"""The build: what the native modules ask of the loader, the switches, what a wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from paikern import _C

ROOT = Path(__file__).parents[1]
MODULES = [Path(_C.__file__), *Path(_C.__file__).parent.glob("_cuda.*.so")]
in_source = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the source folder, not an installed package"
)


def run(*command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )


def undefined_symbols(module: Path) -> str:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = run("nm", "-D", "-C", "--undefined-only", str(module))
    assert listed.returncode == 0, listed.stderr
    return listed.stdout


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name.split(".")[0])
def test_native_modules_ask_nothing_of_torch(module: Path) -> None:
    """So that one build serves every version of torch."""
    symbols = undefined_symbols(module)
    assert "PyErr_" in symbols  # the list is not empty for another reason
    for name in ("c10::", "at::", "torch"):
        assert name not in symbols


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name.split(".")[0])
def test_native_modules_export_nothing_but_their_entry(module: Path) -> None:
    """Two modules with public functions of one name would call each other's."""
    listed = run("nm", "-D", "-C", "--defined-only", str(module)).stdout.splitlines()
    exported = {line.split(maxsplit=2)[2] for line in listed}
    assert not {name for name in exported if "paikern::" in name}
    assert f"PyInit_{module.name.split('.')[0]}" in exported


def build_ext(build: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["setup.py", "-q", "build_ext", "-b", str(build / "lib"), "-t", str(build / "tmp")]
    return run(sys.executable, *command, **variables)


@in_source
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PAIKERN_CUDA": "yes"}, "PAIKERN_CUDA must be AUTO, ON or OFF, got 'YES'"),
        (
            {"PAIKERN_CUDA": "ON", "CUDACXX": "/nowhere/nvcc"},
            "PAIKERN_CUDA=ON but no nvcc was found; set CUDACXX or PAIKERN_CUDA=OFF",
        ),
    ],
    ids=["another value", "no nvcc"],
)
def test_a_bad_switch_stops_the_build_with_one_line(
    variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    done = build_ext(tmp_path, **variables)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == message
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def copied_source(folder: Path) -> Path:
    """A source folder with a native module of one small file, so that builds take seconds."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").write_text("")
    (folder / "paikern").mkdir()
    for name in ("__init__.py", "version.py", "py.typed", "_cuda.pyi"):
        shutil.copy(ROOT / "paikern" / name, folder / "paikern")
    for name in ("csrc/cpu", "csrc/python", "csrc/cuda"):
        (folder / name).mkdir(parents=True)
    shutil.copytree(ROOT / "csrc/include", folder / "csrc/include")
    for name in ("isa.h", "isa.cpp"):
        shutil.copy(ROOT / "csrc/cpu" / name, folder / "csrc/cpu")
    (folder / "csrc/python/module_cpu.cpp").write_text(
        '#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) { m.doc() = ""; }\n'
    )
    for path in (ROOT / "csrc/cuda").iterdir():
        shutil.copy(path, folder / "csrc/cuda")
    shutil.copy(ROOT / "csrc/python/module_cuda.cpp", folder / "csrc/python")
    return folder


def wheel_names(source: Path, **variables: str) -> list[str]:
    pip = [sys.executable, "-m", "pip", "wheel", ".", "-q", "--no-build-isolation", "--no-deps"]
    done = run(*pip, "-w", "wheel", cwd=source, **variables)
    assert done.returncode == 0, done.stderr
    (wheel,) = (source / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    wheel.unlink()
    return names


@in_source
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_wheel_holds_the_modules_and_no_sources(tmp_path: Path) -> None:
    source = copied_source(tmp_path)
    names = wheel_names(source, PAIKERN_CUDA="AUTO", PAIKERN_CUDA_ARCHS="90-real")
    assert {"paikern/py.typed", "paikern/_cuda.pyi"} <= set(names)
    assert any(name.startswith("paikern/_C.") and name.endswith(".so") for name in names)
    assert not [name for name in names if "csrc" in name]
    device_code = {
        f"paikern/cuda_source/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.cuh")
    }
    assert device_code | {"paikern/cuda_source/paikern/key_bits.h"} <= set(names)
    cuda = [name for name in names if name.startswith("paikern/_cuda.")]
    assert bool(cuda) == (shutil.which("nvcc") is not None)
    # The next build in this folder must not find the last one's CUDA module.
    names = wheel_names(source, PAIKERN_CUDA="OFF")
    assert not [name for name in names if name.startswith("paikern/_cuda.") and ".so" in name]


@in_source
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_an_nvcc_that_fails_is_gone_without(tmp_path: Path) -> None:
    source = copied_source(tmp_path)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    nvcc.chmod(0o755)
    names = wheel_names(source, PAIKERN_CUDA="AUTO", CUDACXX=str(nvcc))
    assert any(name.startswith("paikern/_C.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.startswith("paikern/_cuda.") and ".so" in name]


@in_source
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_native_code_is_clean_under_the_sanitizers() -> None:
    done = run("bash", "csrc/testing/run_sanitizers.sh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "sanitizers: no reports"
