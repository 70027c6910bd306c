"""Compiles every Triton kernel for every target, without a GPU.

Asserts that each fits the shared memory of its target and, where the compiler says so, that no
register is spilled; prints a table of the largest needs of each kernel. Runs in processes of its
own, outside of Triton's interpreter.
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
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch  # noqa: F401, torch's libraries come first
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paikern.backends.triton import builds

# Bytes of shared memory that a program may use on each target.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}

_AROUND_CALLS = 16  # bytes: a long division and a rounded quotient call a routine on rare inputs
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Need(NamedTuple):
    kernel: str
    target: str
    name: str
    seconds: float
    shared: int
    registers: int
    spilled: int
    error: str = ""


def compiled(target: str, index: int) -> Need:
    """Compiles entry `index` of the list of builds for a target."""
    gpu, _ = TARGETS[target]
    build = builds.builds("hip" if gpu.backend == "hip" else "cuda")[index]
    pointers = [i for i, kind in enumerate(build.signature.values()) if kind.startswith("*")]
    began = time.perf_counter()
    name = build.kernel.fn.__name__
    try:
        source = ASTSource(
            fn=build.kernel,
            signature=build.signature,
            constexprs=build.constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
        )
        options = {"num_warps": build.warps, "enable_fp_fusion": False}
        made = triton.compile(source, target=gpu, options=options)
        registers, spilled = _amd(made.asm) if gpu.backend == "hip" else _nvidia(made.asm)
    except Exception as error:  # every kernel is tried; the table says what failed
        return Need(name, target, build.name, 0.0, 0, 0, 0, f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - began
    return Need(name, target, build.name, seconds, made.metadata.shared, registers, spilled)


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


def _too_much(need: Need) -> bool:
    limit = TARGETS[need.target][1]
    return bool(need.error) or need.spilled > _AROUND_CALLS or need.shared > limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernels", default="", help="only those with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    jobs = []
    for target in asked.targets:
        listed = builds.builds("hip" if TARGETS[target][0].backend == "hip" else "cuda")
        jobs += [(target, i) for i, b in enumerate(listed) if asked.kernels in b.name]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(asked.jobs, mp_context=context) as pool:
        needs = list(pool.map(compiled, *zip(*jobs, strict=True)))
    wrong = [need for need in needs if _too_much(need)]
    print(
        f"{'kernel':28}{'target':8}{'builds':>7}{'registers':>10}{'shared':>9}{'spilled':>8}{'s':>7}"
    )
    for kernel, target in dict.fromkeys((n.kernel, n.target) for n in needs):
        same = [n for n in needs if (n.kernel, n.target) == (kernel, target)]
        print(
            f"{kernel:28}{target:8}{len(same):7}{max(n.registers for n in same):10}"
            f"{max(n.shared for n in same):9}{max(n.spilled for n in same):8}"
            f"{sum(n.seconds for n in same):7.1f}"
        )
    for need in wrong:
        what = need.error or f"{need.shared} bytes of shared memory, {need.spilled} spilled"
        print(f"{need.target}: {need.name}: {what}", file=sys.stderr)
    print(f"{len(needs)} builds, {len(wrong)} of them wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
