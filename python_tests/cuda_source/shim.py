"""Builds the module `_cuda` from the very CUDA sources with g++ and csrc/testing/cuda_on_cpu.h.

The result lies in build/cuda_on_cpu, named after the content of what it was made from, so that a
second run finds it. `python -m python_tests.cuda_source.shim` builds and prints the path. With
PAIKERN_SHIM_SANITIZE=1 it is built with AddressSanitizer, whose library has to be loaded first, see
`make sanitize`.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from paikern.backends.cuda_launch import Native

ROOT = Path(__file__).parents[2]
FOLDERS = ("csrc/cuda", "csrc/include/paikern")
FLAGS = ("-std=c++20", "-O2", "-g", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function")
SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer")
SANITIZED = os.environ.get("PAIKERN_SHIM_SANITIZE") == "1"


def sources() -> list[Path]:
    inside = [p for folder in FOLDERS for p in (ROOT / folder).iterdir() if p.is_file()]
    others = ("csrc/testing/cuda_on_cpu.h", "csrc/python/module_cuda.cpp")
    return sorted([*inside, *(ROOT / name for name in others)])


def build(sanitize: bool = SANITIZED) -> Path:
    """The module, built unless it is there."""
    digest = hashlib.sha256(repr((FLAGS, sanitize, sys.version)).encode())
    for path in sources():
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build/cuda_on_cpu" / digest.hexdigest()[:16]
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "w") as lock:  # of test processes side by side, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        return target if target.exists() else _compile(folder, target, sanitize)


def _compile(folder: Path, target: Path, sanitize: bool) -> Path:
    import pybind11

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        extra = SANITIZE if sanitize else ()
        includes = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cuda'}"]
        python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
        shim = ["-x", "c++", "-include", str(ROOT / "csrc/testing/cuda_on_cpu.h"), *WARNINGS]
        jobs = [(p, shim) for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
        jobs.append((ROOT / "csrc/python/module_cuda.cpp", ["-O1", *python]))

        def compile_one(job: tuple[Path, Sequence[str]]) -> str:
            source, options = job
            target = f"{scratch}/{source.name}.o"
            _run(["g++", *FLAGS, *extra, *options, *includes, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        made = f"{scratch}/{target.name}"
        _run(["g++", "-shared", *extra, *objects, "-o", made])
        folder.mkdir(exist_ok=True)
        os.replace(made, target)
    return target


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(path: Path) -> ModuleType:
    """The module, beside a `paikern._cuda` that may be there."""
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    spec = importlib.util.spec_from_file_location("_cuda", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class OnCpu(Native):
    """Kernels on CPU tensors, with the switches of the shim."""

    def __init__(self, path: Path) -> None:
        super().__init__(load(path))
        self._hooks = ctypes.CDLL(str(path))
        self._hooks.paikern_on_cpu_without_barrier.restype = ctypes.c_int64

    def multiprocessors(self, device: int) -> int:
        return 2  # few blocks with several tiles each

    def together(self, device: int, each: int) -> int:
        return 1  # blocks run one after the other

    def without_barrier(self, file: str, line: int) -> int:
        """Leave out one barrier (line 0: none); how often the one before was come to."""
        return self._hooks.paikern_on_cpu_without_barrier(file.encode(), line)

    def order(self, way: int) -> None:
        """How threads take turns: 0 all to the next barrier, 1 warp by warp, 2 from the last."""
        self._hooks.paikern_on_cpu_order(way)


def missing() -> str:
    """Why there is nothing to build with; empty if there is."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return ""


if __name__ == "__main__":
    print(build())
