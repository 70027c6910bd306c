"""The CUDA kernels where `paikern._cuda` was not built: the same text, compiled at run time.

NVRTC makes cubins for the exact device, each once: they lie in the cache folder under the hash of
everything they were made from. It is reached through CuPy where that is installed, else by ctypes:
PyTorch's CUDA builds bring the library, and the driver launches. What is compiled is the file of a
kernel that is wanted, not all of them: that takes seconds instead of a minute. The operations are
those of `paikern.backends.cuda`, with their kernels from here.

The folder is `$PAIKERN_CACHE`, else `$XDG_CACHE_HOME/paikern`, else `~/.cache/paikern`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from paikern.backends import cuda, cuda_driver, nvrtc
from paikern.backends.cuda_launch import COOPERATIVE, Step, through

__all__ = ["Jit", "assemble", "backend", "cached", "why_not"]

_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
_KERNEL = re.compile(
    r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(', re.MULTILINE
)
_ROOT = Path(__file__).parents[1]


def folders() -> list[Path]:
    """Where the kernels and the headers they share lie: in the package, or beside it."""
    inside = _ROOT / "cuda_source"
    if inside.is_dir():
        return [inside]
    return [_ROOT.parent / "csrc/cuda", _ROOT.parent / "csrc/include"]


def assemble(places: Sequence[Path] | None = None, only: str | None = None) -> str:
    """All kernels, or those of the file `only`, as one text without includes.

    Each file is in it once, in the order they need.
    """
    where = list(folders() if places is None else places)
    done: set[str] = set()

    def file(name: str) -> str:
        if name in done:
            return ""
        done.add(name)
        path = next((place / name for place in where if (place / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, where))}")
        text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: file(match.group(1)), text)

    names = sorted(path.name for path in where[0].glob("*.cuh"))
    if not names:
        raise FileNotFoundError(f"no CUDA source in {where[0]}; install paikern again")
    return "".join(file(name) for name in ([only] if only else names))


@functools.cache
def files() -> dict[str, str]:
    """Kernel -> the file that defines it."""
    found = {}
    for path in sorted(folders()[0].glob("*.cuh")):
        text = path.read_text(encoding="utf-8")
        found.update(dict.fromkeys(_KERNEL.findall(text), path.name))
    return found


def cache_folder() -> Path:
    asked = os.environ.get("PAIKERN_CACHE")
    if asked:
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paikern"


def key(text: str, options: Sequence[str], version: object) -> str:
    """What a cubin was made from, in 32 digits."""
    return hashlib.sha256(repr((text, tuple(options), version)).encode()).hexdigest()[:32]


def cached(name: str, make: Callable[[], bytes], folder: Path | None = None) -> Path:
    """The file `name` of the cache, made unless it is there.

    It appears whole or not at all, whoever else makes it at the same time or stops half-way. Where
    the folder cannot be written, the file lies in a temporary one of this process.
    """
    place = cache_folder() if folder is None else folder
    target = place / name
    if target.is_file():
        return target
    content = make()
    try:
        place.mkdir(parents=True, exist_ok=True)
        return _written(target, content)
    except OSError:
        return _written(Path(tempfile.mkdtemp(prefix="paikern-")) / name, content)


def _written(target: Path, content: bytes) -> Path:
    handle, draft = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".draft")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    return target


def options_for(capability: tuple[int, int]) -> tuple[str, ...]:
    """For NVRTC: a cubin of this device; a score must round alike wherever it is made again."""
    arch = f"{capability[0]}{capability[1]}"
    return ("--std=c++17", "--fmad=false", f"--gpu-architecture=sm_{arch}")


def compiled(compiler: Any, text: str, options: Sequence[str]) -> bytes:
    """The cubin; RuntimeError with the compiler's words, whose lines are those of the text."""
    program = compiler.createProgram(text, "paikern.cu", (), ())
    try:
        try:
            compiler.compileProgram(program, tuple(options))
        except Exception as error:
            words = compiler.getProgramLog(program)
            raise RuntimeError(f"the CUDA kernels did not compile: {error}\n{words}") from error
        return compiler.getCUBIN(program)
    finally:
        compiler.destroyProgram(program)


class Jit:
    """Kernels from modules of CuPy or of `cuda_driver`, one a device and file."""

    def __init__(self, cupy: Any, compiler: Any) -> None:
        self._cupy, self._nvrtc = cupy, compiler
        self._modules: dict[tuple[int, str, bool], Any] = {}
        self._kernels: dict[tuple[int, str], Any] = {}

    def _module(self, device: int, file: str, together: bool) -> Any:
        """Of a file; its cooperative kernels are in a module of their own."""
        if (device, file, together) not in self._modules:
            text = assemble(only=file)
            options = options_for(torch.cuda.get_device_capability(device))
            name = f"{key(text, options, self._nvrtc.getVersion())}.cubin"
            path = cached(name, lambda: compiled(self._nvrtc, text, options))
            more = {"enable_cooperative_groups": True} if together else {}
            module = self._cupy.RawModule(path=str(path), **more)
            self._modules[device, file, together] = module
        return self._modules[device, file, together]

    def _kernel(self, device: int, name: str) -> Any:
        found = self._kernels.get((device, name))
        if found is None:
            module = self._module(device, files()[name], name in COOPERATIVE)
            found = self._kernels[device, name] = module.get_function(name)
        return found

    def run(self, steps: Sequence[Step], device: int, stream: int) -> None:
        import numpy as np

        with self._cupy.cuda.Device(device), self._cupy.cuda.ExternalStream(stream, device):
            for step in steps:
                arguments = tuple(
                    np.float64(a) if isinstance(a, float) else np.int64(a) for a in step.arguments
                )
                kernel = self._kernel(device, step.kernel)
                kernel((step.blocks,), (step.threads,), arguments, shared_mem=step.shared)

    def multiprocessors(self, device: int) -> int:
        return torch.cuda.get_device_properties(device).multi_processor_count

    def together(self, device: int, each: int) -> int:
        return each * self.multiprocessors(device)


def _extra() -> str:
    """The extra whose CuPy fits this PyTorch."""
    version = torch.version.cuda
    if version is None:
        return "`pip install 'paikern[cuda13]'` (or cuda12, as your driver allows)"
    return f"`pip install 'paikern[cuda{version.split('.')[0]}]'`"


def why_not() -> tuple[Any, Any, str]:
    """What launches, what compiles, and why they cannot be used; empty if they can."""
    if not torch.cuda.is_available():
        return None, None, "no GPU that this build of PyTorch can use"
    if torch.version.cuda is None:
        return None, None, "CUDA kernels need NVIDIA's build of PyTorch; use the triton backend"
    cupy, compiler, why = _cupy()
    if not why:
        return cupy, compiler, ""
    own, place = nvrtc.find(torch.version.cuda.split(".")[0])
    if own is None:
        return None, None, f"{why}; and without CuPy: {place}"
    try:
        return cuda_driver.Driver(), own, ""
    except (OSError, RuntimeError) as error:
        return None, None, f"{why}; and without CuPy: the driver says {_line(error)}"


def _cupy() -> tuple[Any, Any, str]:
    """CuPy and its NVRTC, and why they cannot be used; empty if they can."""
    try:
        import cupy
        from cupy.cuda import nvrtc as compiler
    except ImportError as error:
        if getattr(error, "name", None) == "cupy" or "cupy" not in sys.modules:
            return None, None, f"CuPy is not installed; {_extra()}"
        return None, None, f"CuPy could not be imported ({_line(error)}); {_extra()}"
    try:
        compiler.getVersion()
    except Exception as error:
        return None, None, f"NVRTC could not be loaded ({_line(error)}); {_extra()}"
    return cupy, compiler, ""


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def backend(provider: Any) -> SimpleNamespace:
    """The operations of `paikern.backends.cuda` with their kernels from `provider`."""
    functions = {name: through(provider, getattr(cuda, name)) for name in cuda.__all__}
    return SimpleNamespace(**{**functions, "takes": cuda.takes})
