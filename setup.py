"""Builds the native modules through CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure, build and install `_C` (and `_cuda`) into the package folder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        cuda = os.environ.get("PAIKERN_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"PAIKERN_CUDA must be AUTO, ON or OFF, got {cuda!r}")
        try:
            self._build(target, cuda)
        except subprocess.CalledProcessError:
            if cuda != "AUTO" or shutil.which("nvcc") is None:
                raise SystemExit(
                    "paikern: the native build failed; the compiler's message is above"
                ) from None
            print("paikern: the CUDA module did not build, going on without it", file=sys.stderr)
            self._build(target, "OFF")

    def _build(self, target: Path, cuda: str) -> None:
        import pybind11

        options = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPAIKERN_CUDA={cuda}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        if archs := os.environ.get("PAIKERN_CUDA_ARCHS"):
            options.append(f"-DPAIKERN_CUDA_ARCHS={archs}")
        if shutil.which("ninja"):
            options.append("-GNinja")
        # pip builds in the tree: a folder of its own for each set of options and environment keeps
        # a stale CMake cache from answering for another one.
        key = hashlib.sha256("\n".join([*options, sys.version]).encode()).hexdigest()[:12]
        build = ROOT / "build" / f"cmake-{key}"
        run = subprocess.check_call
        run(["cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *options])
        run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        run(["cmake", "--install", str(build)])


setup(ext_modules=[Extension("paikern._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
