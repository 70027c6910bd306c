"""CUB's selection as a contender: bench/gpu_topk_cub.cu, compiled by nvcc when first wanted."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("gpu_topk_cub.cu")


def include_folders() -> Iterator[Path]:
    """CCCL's headers in packages, newer than a toolkit's as a rule: NVIDIA's own and CuPy's."""
    for place in map(Path, filter(None, sys.path)):
        yield from place.glob("nvidia/*/include/cccl")
        bundled = place / "cupy/_core/include/cupy/_cccl"
        if bundled.is_dir():
            yield bundled


def _flags(folder: Path | None) -> list[str]:
    if folder is None:
        return []
    # CuPy keeps the three libraries of CCCL apart.
    parts = [folder / name for name in ("cub", "thrust", "libcudacxx")]
    return [f"-I{part}" for part in ([folder] if (folder / "cub/cub.cuh").exists() else parts)]


def _has_topk(folder: Path) -> bool:
    return any((folder / name / "device/device_topk.cuh").exists() for name in ("cub", "cub/cub"))


class Cub:
    """k largest float32 keys, unordered; memory is taken once for each n and k."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.paikern_cub_name.restype = ctypes.c_char_p
        self.name = self._library.paikern_cub_name().decode()
        number = self._library.paikern_cub_version()
        self.version = f"{number // 100000}.{number // 100 % 1000}.{number % 100}"

    def topk(self, n: int, k: int, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The call for that many keys."""
        found = torch.empty(k if self.name.endswith("TopK") else n, device=device)
        needed = ctypes.c_size_t()

        def run(temporary: int, keys: int) -> None:
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            code = self._library.paikern_cub_topk(
                ctypes.c_void_p(temporary or None), ctypes.byref(needed), ctypes.c_void_p(keys),
                ctypes.c_void_p(found.data_ptr()), ctypes.c_longlong(n), ctypes.c_longlong(k),
                ctypes.c_void_p(stream),
            )  # fmt: skip
            if code:
                raise RuntimeError(f"{self.name}: CUDA error {code}")

        run(0, found.data_ptr())
        temporary = torch.empty(max(1, needed.value), dtype=torch.uint8, device=device)

        def call(keys: Tensor) -> Tensor:
            run(temporary.data_ptr(), keys.data_ptr())
            return found[:k]

        return call


def compiled(arch: str) -> Cub:
    """For `arch` (sm_90); RuntimeError with one line where there is no compiler or it fails."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise RuntimeError("nvcc was not found")
    folders: list[Path | None] = [*filter(_has_topk, include_folders()), None]
    said = ""
    for folder in folders:
        target = Path(tempfile.mkdtemp(prefix="paikern-cub-")) / "cub.so"
        command = [nvcc, "-std=c++17", "-O2", f"-arch={arch}", "--shared", "-Xcompiler", "-fPIC"]
        done = subprocess.run(
            [*command, *_flags(folder), "-o", str(target), str(SOURCE)],
            capture_output=True,
            text=True,
            env={**os.environ},
        )
        if done.returncode == 0:
            return Cub(target)
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
    raise RuntimeError(f"nvcc could not compile {SOURCE.name}: {said.strip()}")
