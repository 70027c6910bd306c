"""Compiles the CUDA kernels with NVRTC, as they are at run time where `paikern._cuda` is missing.

NVRTC comes with a CUDA toolkit, with PyTorch's CUDA builds, with CuPy's or as the package
nvidia-cuda-nvrtc; it needs no GPU. Called through ctypes, so that nothing else has to be there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import budgets
import check_cuda

from paikern.backends import cuda_jit
from paikern.backends.nvrtc import Nvrtc


def compiled(nvrtc: Nvrtc, text: str, options: Sequence[str]) -> tuple[bytes, str]:
    """The cubin and what the compiler says; RuntimeError where it does not compile."""
    program = nvrtc.createProgram(text, "paikern.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, options)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{nvrtc.getProgramLog(program)}") from error
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


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
            cubin, words = compiled(nvrtc, text, options)
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
