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
        if cuda != "OFF" and not find_nvcc():
            if cuda == "ON":
                raise SystemExit(
                    "PAIKERN_CUDA=ON but no nvcc was found; set CUDACXX or PAIKERN_CUDA=OFF"
                )
            cuda = "OFF"
        try:
            self._build(target, cuda)
        except subprocess.CalledProcessError:
            if cuda != "AUTO":
                raise SystemExit(
                    "paikern: the native build failed; the compiler's message is above"
                ) from None
            print("paikern: the CUDA module did not build, going on without it", file=sys.stderr)
            self._build(target, "OFF")

    def _build(self, target: Path, cuda: str) -> None:
        import pybind11

        options = [f"-DPAIKERN_CUDA={cuda}", f"-DPython_EXECUTABLE={sys.executable}"]
        if archs := os.environ.get("PAIKERN_CUDA_ARCHS"):
            options.append(f"-DPAIKERN_CUDA_ARCHS={archs}")
        # pip builds in the tree: a folder for each set of options keeps a stale CMake cache from
        # answering for another one. Where an isolated build finds its tools changes every time, so
        # that is passed anew and no part of the key.
        key = hashlib.sha256("\n".join([*options, sys.version]).encode()).hexdigest()[:12]
        build = ROOT / "build" / f"cmake-{key}"
        options += [
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        if ninja := shutil.which("ninja"):
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        run = subprocess.check_call
        run(["cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *options])
        run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        run(["cmake", "--install", str(build)])


def find_nvcc() -> str | None:
    """Where CMake will look too: CUDACXX, the PATH, CUDA_HOME."""
    if compiler := os.environ.get("CUDACXX"):
        return shutil.which(compiler)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


setup(
    ext_modules=[Extension("paikern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # cmake from the PATH where there is one, else as a package.
    setup_requires=[] if shutil.which("cmake") else ["cmake>=3.18"],
)
