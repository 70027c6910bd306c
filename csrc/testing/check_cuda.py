"""Compiles every kernel for two GPUs without one, and says what each needs.

`python csrc/testing/check_cuda.py [ARCH ...]` (default 80 90) runs nvcc on each csrc/cuda/*.cu with
`-Xptxas -v`, prints registers and shared memory of every kernel and fails on a spill, or where a
kernel needs more than its block can have. Needs nvcc, no GPU, nothing else of the project.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cuda"
REGISTERS = {256: 255, 1024: 64}  # of a thread, by threads of a block
SHARED = 48 * 1024  # static shared memory of a block


class Kernel(NamedTuple):
    name: str
    arch: int
    registers: int
    shared: int
    stack: int
    spilled: int


def compile_for(source: Path, arch: int) -> list[Kernel]:
    """The kernels of a .cu; raises RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                "nvcc", "-std=c++17", f"-arch=sm_{arch}", "--fmad=false", "-cubin", "-Xptxas", "-v",
                f"-I{ROOT / 'csrc/include'}", f"-I{SOURCES}", "-o", f"{folder}/kernels.cubin",
                str(source),
            ],
            capture_output=True,
            text=True,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{source.name}, sm_{arch}: {done.stderr}")
    return list(parse(done.stderr, arch))


def parse(words: str, arch: int) -> list[Kernel]:
    """What ptxas says: spills of called functions count for the kernel above them."""
    found = []
    for part in words.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        numbers = {
            key: sum(map(int, re.findall(pattern, part)))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "spilled": r"(\d+) bytes spill",
            }.items()
        }
        found.append(Kernel(name, arch, **numbers))
    return found


def threads_of(name: str) -> int:
    """The bound that the kernel is compiled with."""
    text = "".join(path.read_text() for path in SOURCES.glob("*.cuh"))
    bound = re.search(rf"__launch_bounds__\((\d+)[^)]*\)\s+{name}\(", text)
    return int(bound.group(1)) if bound else 256


def faults(kernel: Kernel) -> list[str]:
    most = REGISTERS[threads_of(kernel.name)]
    wrong = []
    if kernel.spilled:
        wrong.append(f"spills {kernel.spilled} bytes")
    if kernel.registers > most:
        wrong.append(f"more than {most} registers")
    if kernel.shared > SHARED:
        wrong.append(f"more than {SHARED} bytes of shared memory")
    return wrong


def main(arches: list[int]) -> int:
    if shutil.which("nvcc") is None:
        print("check_cuda: nvcc was not found; install the CUDA toolkit's compiler")
        return 1
    print(f"{'kernel':34} {'sm':>4} {'registers':>9} {'shared':>7} {'stack':>6}")
    failed = False
    for source in sorted(SOURCES.glob("*.cu")):
        for arch in arches:
            for kernel in compile_for(source, arch):
                wrong = ", ".join(faults(kernel))
                failed |= bool(wrong)
                print(
                    f"{kernel.name:34} {arch:4} {kernel.registers:9} {kernel.shared:7} "
                    f"{kernel.stack:6} {wrong}"
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]] or [80, 90]))
