"""Compiles every CUDA kernel for GPUs without one, and says what each needs.

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import budgets

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cuda"
DEFAULT = (80, 90)
THREADS = 256  # of a kernel without bounds


def compile_for(source: Path, arch: int) -> list[budgets.Need]:
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
    return list(parse(done.stderr, f"sm_{arch}", "nvcc"))


def parse(words: str, target: str, compiler: str) -> Iterator[budgets.Need]:
    """What ptxas says: spills of called functions count for the kernel above them."""
    threads = bounds()
    for part in words.split("Compiling entry function '")[1:]:
        name = part.split("'", 1)[0]
        numbers = {
            key: sum(map(int, re.findall(pattern, part)))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "spilled": r"(\d+) bytes spill",
            }.items()
        }
        yield budgets.Need(name, compiler, target, threads.get(name, THREADS), **numbers)


def bounds() -> dict[str, int]:
    """The most threads of a block that each kernel is compiled for, where it says so."""
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))
    named = dict(re.findall(r"#define\s+(\w+)\s+(\d+)\b", text))
    named |= dict(re.findall(r"constexpr\s+\w+\s+(\w+)\s*=\s*(\d+)\s*;", text))
    found = re.findall(r"__launch_bounds__\(\s*(\w+)[^)]*\)\s+(\w+)\(", text)
    return {kernel: int(named.get(number, number)) for number, kernel in found}


def needs(arches: Sequence[int] = DEFAULT, jobs: int | None = None) -> list[budgets.Need]:
    """Every kernel of every .cu; one that does not compile is named with the compiler's words."""

    def one(job: tuple[Path, int]) -> list[budgets.Need]:
        source, arch = job
        try:
            return compile_for(source, arch)
        except RuntimeError as error:
            failed = budgets.Need(source.name, "nvcc", f"sm_{arch}", THREADS, 0, 0, 0)
            return [failed._replace(error=str(error))]

    work = [(source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in arches]
    with ThreadPoolExecutor(jobs) as pool:
        return [need for found in pool.map(one, work) for need in found]


def main(arches: list[int]) -> int:
    if shutil.which("nvcc") is None:
        print("check_cuda: nvcc was not found; install the CUDA toolkit's compiler")
        return 1
    found = needs(arches or DEFAULT, 1)
    print(*budgets.table(found), sep="\n")
    wrong = budgets.verdict(found)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main([int(a) for a in sys.argv[1:]]))
