"""Compiles every Triton kernel for every target, without a GPU.

Asserts that each fits the registers and the shared memory of its target and that nothing is
spilled; prints a table of the largest needs of each kernel. Runs in processes of its own, outside
of Triton's interpreter. What was compiled is kept in build/triton, by content.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
sys.path.insert(0, str(ROOT))

import budgets  # noqa: E402, beside this file
import torch  # noqa: E402, F401, torch's libraries come first
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from paikern.backends.triton import builds  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_AROUND_CALLS = 16  # bytes: a long division and a rounded quotient call a routine on rare inputs
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compiled(target: str, index: int) -> budgets.Need:
    """Compiles entry `index` of the list of builds for a target."""
    gpu = TARGETS[target]
    build = builds.builds("hip" if gpu.backend == "hip" else "cuda")[index]
    pointers = [i for i, kind in enumerate(build.signature.values()) if kind.startswith("*")]
    began = time.perf_counter()
    need = budgets.Need(
        build.kernel.fn.__name__, "triton", target, build.warps * gpu.warp_size, 0, 0, 0,
        build.name, _AROUND_CALLS,
    )  # fmt: skip
    try:
        source = ASTSource(
            fn=build.kernel,
            signature=build.signature,
            constexprs=build.constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
        )
        options = {"num_warps": build.warps, "enable_fp_fusion": build.fused}
        made = triton.compile(source, target=gpu, options=options)
        registers, spilled = _amd(made.asm) if gpu.backend == "hip" else _nvidia(made.asm)
    except Exception as error:  # every kernel is tried; the table says what failed
        return need._replace(error=f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - began
    return need._replace(
        registers=registers, shared=made.metadata.shared, spilled=spilled, seconds=seconds
    )


def _nvidia(asm: dict[str, Any]) -> tuple[int, int]:
    """Registers and bytes spilled, as the tools that come with triton tell them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(asm["cubin"])
        said = _tool("cuobjdump", "--dump-resource-usage", cubin)
        number = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", said)}
        if number["STACK"] == 0:
            return number["REG"], 0
        # A stack may hold what a long division calls for; only ptxas tells that from spills.
        ptx.write_text(asm["ptx"])
        arch = re.search(r"\.target\s+(\w+)", asm["ptx"])
        assert arch is not None
        # The newer of the two assemblers reads every version of PTX that triton writes.
        newest = max(path.name for path in _TOOLS.glob("ptxas*"))
        said = _tool(newest, "-v", "--fmad=false", f"--gpu-name={arch[1]}", "-o", cubin, ptx)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    return number["REG"], sum(map(int, spills))


def _tool(name: str, *args: str | Path) -> str:
    done = subprocess.run([_TOOLS / name, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr or done.stdout}")
    return done.stdout + done.stderr


def _amd(asm: dict[str, Any]) -> tuple[int, int]:
    text = asm["amdgcn"]
    number = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    # Scalar registers are spilled to lanes of vector registers, not to memory.
    return number["vgpr_count"], number["vgpr_spill_count"]


def needs(targets: Sequence[str], kernels: str = "", jobs: int | None = None) -> list[budgets.Need]:
    """Every build of every kernel with `kernels` in its name, for every target."""
    work = []
    for target in targets:
        listed = builds.builds("hip" if TARGETS[target].backend == "hip" else "cuda")
        work += [(target, i) for i, b in enumerate(listed) if kernels in b.name]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(compiled, *zip(*work, strict=True), chunksize=4)) if work else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", default="", help="only those with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    found = needs(asked.targets, asked.kernels, asked.jobs)
    print(*budgets.table(found), sep="\n")
    wrong = budgets.verdict(found)
    print(*wrong, sep="\n", file=sys.stderr)
    print(f"{len(found)} builds, {len(wrong)} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
