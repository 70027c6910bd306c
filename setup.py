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
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure once; build and install `_C`, and `_cuda` where there is a compiler for it."""

    def run(self) -> None:
        self.cuda, self.nvcc = _cuda_choice()
        if shutil.which("cmake") is None:
            raise SystemExit("paikern: cmake was not found; install it, or `pip install cmake`")
        try:
            self.folder = self._configure(self.cuda)
        except subprocess.CalledProcessError:
            if self.cuda != "AUTO":
                raise SystemExit("paikern: CMake failed; its message is above") from None
            print("paikern: nvcc does not work, going on without it", file=sys.stderr)
            self.folder = self._configure("OFF")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        module = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        if module == "_cuda":
            # One left by an earlier build with other switches would be taken for new.
            in_tree = [ROOT / "paikern"] if self.inplace or self.editable_mode else []
            for folder in [target, *in_tree]:
                for stale in folder.glob("_cuda.*.so"):
                    stale.unlink()
            if not (self.folder / "with_cuda").exists():
                return
        try:
            jobs = str(os.cpu_count() or 1)
            build = ["cmake", "--build", str(self.folder), "--target", module, "--parallel", jobs]
            subprocess.check_call(build)
            install = ["cmake", "--install", str(self.folder), "--component", module]
            subprocess.check_call([*install, "--prefix", str(target)])
        except subprocess.CalledProcessError:
            if module == "_C" or self.cuda == "ON":
                raise SystemExit(
                    "paikern: the native build failed; the compiler's message is above"
                ) from None
            print("paikern: the CUDA module did not build, going on without it", file=sys.stderr)

    def _configure(self, cuda: str) -> Path:
        """Run CMake; returns the build folder, which holds `with_cuda` if `_cuda` can be built."""
        import pybind11

        options = [f"-DPAIKERN_CUDA={cuda}", f"-DPython_EXECUTABLE={sys.executable}"]
        if archs := os.environ.get("PAIKERN_CUDA_ARCHS"):
            options.append(f"-DPAIKERN_CUDA_ARCHS={archs}")
        # pip builds in the tree: a folder for each set of options and compilers keeps a stale CMake
        # cache from answering for another one. Where an isolated build finds its tools changes
        # every time, so that is passed anew and no part of the key.
        compilers = [os.environ.get("CXX", ""), self.nvcc or ""]
        key = hashlib.sha256("\n".join([*options, *compilers, sys.version]).encode()).hexdigest()
        folder = ROOT / "build" / f"cmake-{key[:12]}"
        options += ["-DCMAKE_BUILD_TYPE=Release", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        if ninja := shutil.which("ninja"):
            options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        environment = {**os.environ, **({"CUDACXX": self.nvcc} if self.nvcc else {})}
        command = ["cmake", "-S", str(ROOT), "-B", str(folder), *options]
        subprocess.check_call(command, env=environment)
        return folder


class WithCudaSource(build_py):
    """Puts the device code beside the package: without `_cuda` it is compiled at run time."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # found in csrc
        target = Path(self.build_lib) / "paikern/cuda_source"
        (target / "paikern").mkdir(parents=True, exist_ok=True)
        for source in (ROOT / "csrc/cuda").glob("*.cuh"):
            shutil.copy2(source, target / source.name)
        for header in (ROOT / "csrc/include/paikern").glob("*.h"):
            shutil.copy2(header, target / "paikern")


def _cuda_choice() -> tuple[str, str | None]:
    """PAIKERN_CUDA and the nvcc it leads to; AUTO without one is OFF."""
    cuda = os.environ.get("PAIKERN_CUDA", "AUTO").upper()
    if cuda not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"PAIKERN_CUDA must be AUTO, ON or OFF, got {cuda!r}")
    nvcc = find_nvcc() if cuda != "OFF" else None
    if cuda == "ON" and nvcc is None:
        raise SystemExit("PAIKERN_CUDA=ON but no nvcc was found; set CUDACXX or PAIKERN_CUDA=OFF")
    return (cuda if nvcc else "OFF"), nvcc


def find_nvcc() -> str | None:
    """Where CMake will look too: CUDACXX, the PATH, CUDA_HOME."""
    if compiler := os.environ.get("CUDACXX"):
        return shutil.which(compiler)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


setup(
    ext_modules=[
        Extension("paikern._C", sources=[]),
        Extension("paikern._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithCudaSource},
    # cmake from the PATH where there is one, else as a package.
    setup_requires=[] if shutil.which("cmake") else ["cmake>=3.18"],
)
