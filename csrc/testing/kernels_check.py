"""Every kernel through every compiler that is here, without a GPU: one table of what each needs.

    python csrc/testing/kernels_check.py      (make kernels-check)

    triton  every kernel in every configuration, for sm_80, sm_90, sm_100 and gfx942
    nvcc    every csrc/cuda/*.cu, for sm_80 and sm_90
    nvrtc   all csrc/cuda/*.cuh as one text, for sm_80 and sm_90

`blocks` is how many blocks a multiprocessor holds at once, as far as registers, shared memory and
threads go. Ends with 1 where a kernel does not compile, spills registers, or needs more than its
target has. A compiler that is missing is named as not checked, and is no fault.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import budgets


def triton(jobs: int | None) -> list[budgets.Need] | str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import check_kernels

    return check_kernels.needs(list(check_kernels.TARGETS), jobs=jobs)


def nvcc(jobs: int | None) -> list[budgets.Need] | str:
    if shutil.which("nvcc") is None:
        return "nvcc was not found"
    import check_cuda

    return check_cuda.needs(jobs=jobs)


def nvrtc(jobs: int | None) -> list[budgets.Need] | str:
    import check_nvrtc

    from paikern.backends.nvrtc import find

    library, where = find()
    return where if library is None else check_nvrtc.needs(library, jobs=jobs)


CHECKS = {"triton": triton, "nvcc": nvcc, "nvrtc": nvrtc}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    found: list[budgets.Need] = []
    said = []
    for name in asked.only:
        began = time.perf_counter()
        answer = CHECKS[name](asked.jobs)
        seconds = time.perf_counter() - began
        if isinstance(answer, str):
            said.append(f"{name.upper()}: not checked ({answer})")
        else:
            found += answer
            said.append(f"{name}: {len(answer)} builds in {seconds:.0f} s")
    print(*budgets.table(found), *said, sep="\n", flush=True)
    wrong = budgets.verdict(found)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    print(f"{len(found)} builds, {len(wrong)} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
