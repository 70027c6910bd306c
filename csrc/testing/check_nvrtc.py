"""Compiles the CUDA kernels with NVRTC, as they are at run time where `paikern._cuda` is missing.

NVRTC comes with a CUDA toolkit, with PyTorch's CUDA builds, with CuPy's or as the package
nvidia-cuda-nvrtc; it needs no GPU. Called through ctypes, so that nothing else has to be there.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import budgets
import check_cuda

from paikern.backends import cuda_jit


def candidates() -> Iterator[Path]:
    """Libraries of NVRTC: in packages, then in toolkits, the newest first."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) for home in [*homes, "/usr/local/cuda"] if home]
    for place, pattern in [
        *((Path(path), "nvidia/*/lib*/libnvrtc.so.*") for path in sys.path if path),
        *((folder, "lib*/libnvrtc.so.*") for folder in folders),
        *((folder, "targets/*/lib/libnvrtc.so.*") for folder in folders),
    ]:
        yield from sorted(place.glob(pattern), reverse=True)


class Nvrtc:
    """The few calls that are needed; RuntimeError with NVRTC's name of an error."""

    def __init__(self, library: str) -> None:
        self._library = ctypes.CDLL(library)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, f"nvrtc{name}")(*arguments)
        if code:
            raise RuntimeError(self._library.nvrtcGetErrorString(code).decode())

    def compiled(self, text: str, options: Sequence[str]) -> tuple[bytes, str]:
        """The cubin and what the compiler says; RuntimeError where it does not compile."""
        program = ctypes.c_void_p()
        self._call(
            "CreateProgram", ctypes.byref(program), text.encode(), b"paikern.cu", 0, None, None
        )
        try:
            listed = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            try:
                self._call("CompileProgram", program, len(options), listed)
            except RuntimeError as error:
                raise RuntimeError(f"{error}\n{self._bytes('ProgramLog', program)!r}") from error
            words = self._bytes("ProgramLog", program).rstrip(b"\0").decode()
            return self._bytes("CUBIN", program), words
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _bytes(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{name}Size", program, ctypes.byref(size))
        held = ctypes.create_string_buffer(size.value)
        self._call(f"Get{name}", program, held)
        return held.raw


def find() -> tuple[Nvrtc | None, str]:
    """NVRTC and where it is, or None and why not."""
    why = "no libnvrtc.so; pip install nvidia-cuda-nvrtc"
    for path in [*map(str, candidates()), "libnvrtc.so"]:
        try:
            return Nvrtc(path), path
        except (OSError, AttributeError, RuntimeError) as error:
            if path != "libnvrtc.so":
                why = f"{path}: {error}"
    return None, why


def needs(
    nvrtc: Nvrtc, arches: Sequence[int] = check_cuda.DEFAULT, jobs: int | None = None
) -> list[budgets.Need]:
    """The kernels of the whole text.

    A spill is shown and no fault: another version of the compiler is in every installation, and
    registers are tuned with nvcc. That it compiles, and holds every kernel, is what is asked.
    """
    text = cuda_jit.assemble()
    declared = r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\('
    names = set(re.findall(declared, text))

    def one(arch: int) -> list[budgets.Need]:
        options = (*cuda_jit.options_for(divmod(arch, 10)), "--ptxas-options=-v")
        whole = budgets.Need("paikern.cu", "nvrtc", f"sm_{arch}", check_cuda.THREADS, 0, 0, 0)
        try:
            cubin, words = nvrtc.compiled(text, options)
        except RuntimeError as error:
            return [whole._replace(error=str(error))]
        told = list(check_cuda.parse(words, f"sm_{arch}", "nvrtc"))
        found = [need._replace(tolerated=need.spilled) for need in told]
        missing = {name for name in names if name.encode() not in cubin}
        if missing or not cubin.startswith(b"\x7fELF"):
            found.append(whole._replace(error=f"the cubin lacks {', '.join(sorted(missing))}"))
        return found

    with ThreadPoolExecutor(jobs) as pool:
        return [need for found in pool.map(one, arches) for need in found]
