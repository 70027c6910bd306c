"""NVRTC, NVIDIA's run-time compiler, through ctypes: PyTorch's CUDA builds bring the library.

The calls have the names and the ways of CuPy's `cupy.cuda.nvrtc`, so that `cuda_jit` takes either.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["Nvrtc", "find"]


def candidates(major: str = "") -> Iterator[Path]:
    """Libraries: in packages, then in toolkits, the newest first; of one CUDA major version."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) for home in [*homes, "/usr/local/cuda"] if home]
    name = f"libnvrtc.so.{major}*"
    for place, pattern in [
        *((Path(path), f"nvidia/*/lib*/{name}") for path in sys.path if path),
        *((folder, f"lib*/{name}") for folder in folders),
        *((folder, f"targets/*/lib/{name}") for folder in folders),
    ]:
        yield from sorted(place.glob(pattern), reverse=True)


class Nvrtc:
    """The few calls that are needed; RuntimeError with NVRTC's name of an error."""

    def __init__(self, library: str) -> None:
        # It asks for its built-in functions by name, and would not look beside itself.
        beside = Path(library).parent.glob("libnvrtc-builtins.so.*") if "/" in library else ()
        self._builtins = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in beside]
        self._library = ctypes.CDLL(library)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self.getVersion()

    def getVersion(self) -> tuple[int, int]:  # noqa: N802
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def createProgram(  # noqa: N802
        self, text: str, name: str, headers: Sequence[str], includes: Sequence[str]
    ) -> ctypes.c_void_p:
        """A program of one text without headers."""
        program = ctypes.c_void_p()
        arguments = (text.encode(), name.encode(), 0, None, None)
        self._call("CreateProgram", ctypes.byref(program), *arguments)
        return program

    def compileProgram(  # noqa: N802
        self, program: ctypes.c_void_p, options: Sequence[str]
    ) -> None:
        listed = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        self._call("CompileProgram", program, len(options), listed)

    def getProgramLog(self, program: ctypes.c_void_p) -> str:  # noqa: N802
        return self._bytes("ProgramLog", program).rstrip(b"\0").decode()

    def getCUBIN(self, program: ctypes.c_void_p) -> bytes:  # noqa: N802
        return self._bytes("CUBIN", program)

    def destroyProgram(self, program: ctypes.c_void_p) -> None:  # noqa: N802
        self._call("DestroyProgram", ctypes.byref(program))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, f"nvrtc{name}")(*arguments)
        if code:
            raise RuntimeError(self._library.nvrtcGetErrorString(code).decode())

    def _bytes(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{name}Size", program, ctypes.byref(size))
        held = ctypes.create_string_buffer(size.value)
        self._call(f"Get{name}", program, held)
        return held.raw


def find(major: str = "") -> tuple[Nvrtc | None, str]:
    """NVRTC and where it is, or None and why not.

    Args:
        major: of CUDA, as in "13"; "" takes any. A driver loads what a compiler of its own major
            version made.
    """
    last = f"libnvrtc.so.{major}" if major else "libnvrtc.so"
    why = f"no {last}; pip install nvidia-cuda-nvrtc"
    for path in [*map(str, candidates(major)), last]:
        try:
            return Nvrtc(path), path
        except (OSError, AttributeError, RuntimeError) as error:
            if path != last:
                why = f"{path}: {error}"
    return None, why
