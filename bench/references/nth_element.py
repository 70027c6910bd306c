"""`std::nth_element` and a plain read of memory, compiled on first use and called by address."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")


class CompilerMissingError(RuntimeError):
    """There is no g++ to compile the contender with."""


def cache_folder() -> Path:
    """Compiled contenders live in the user's cache, not in the sources."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "paikern-bench"


def compiler_version() -> str:
    """The first line of `g++ --version`."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise CompilerMissingError("nth_element: g++ was not found; install it to time this one")
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def _processor() -> str:
    """What `-march=native` depends on, as far as it can be told."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def compiled(source: Path) -> ctypes.CDLL:
    """Load a compiled source file, compiling it if this machine has not done so before."""
    parts = (source.read_text(), *FLAGS, compiler_version(), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache_folder() / f"{source.stem}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            subprocess.run(["g++", *FLAGS, "-o", str(built), str(source)], check=True)
            os.replace(built, path)
    return ctypes.CDLL(str(path))


@functools.cache
def library() -> ctypes.CDLL:
    """`nth_element.cpp`, with the types of its functions."""
    loaded = compiled(SOURCE)
    address, count = ctypes.c_void_p, ctypes.c_int64
    loaded.nth_element_float32.argtypes = [address, count, count]
    loaded.nth_element_float32.restype = ctypes.c_float
    loaded.nth_element_float64.argtypes = [address, count, count]
    loaded.nth_element_float64.restype = ctypes.c_double
    loaded.read_bytes.argtypes = [address, count, ctypes.c_int32]
    loaded.read_bytes.restype = ctypes.c_uint64
    return loaded


def nth_element_(values: np.ndarray, k: int) -> float:
    """The k-th largest of a contiguous float32 or float64 array, which is reordered.

    >>> nth_element_(np.array([3.0, 1.0, 2.0], dtype=np.float32), 2)
    2.0
    """
    function = {"float32": "nth_element_float32", "float64": "nth_element_float64"}[
        values.dtype.name
    ]
    if not values.flags.c_contiguous:
        raise ValueError("nth_element_: the array must be contiguous")
    if not 1 <= k <= values.size:
        raise ValueError(f"nth_element_: k must be in [1, {values.size}], got {k}")
    return float(getattr(library(), function)(values.ctypes.data, values.size, k))


def read_bytes(tensor: Tensor, threads: int) -> int:
    """Read a contiguous tensor once, 64 bytes a load, and return the xor of its words."""
    if not tensor.is_contiguous():
        raise ValueError("read_bytes: the tensor must be contiguous")
    if threads < 1:
        raise ValueError(f"read_bytes: threads must be >= 1, got {threads}")
    return int(library().read_bytes(tensor.data_ptr(), tensor.nbytes, threads))
