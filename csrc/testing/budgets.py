"""What a compiled kernel needs, what its target has, and one table of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

# Of one multiprocessor (compute unit): registers of 32 bits, bytes of shared memory that one block
# may use, threads, blocks.
LIMITS = {
    "sm_80": (65536, 163 * 1024, 2048, 32),
    "sm_90": (65536, 227 * 1024, 2048, 32),
    "sm_100": (65536, 227 * 1024, 2048, 32),
    "gfx942": (4 * 512 * 64, 64 * 1024, 2048, 32),
}
MOST_REGISTERS = {"gfx942": 512}  # of a thread; 255 on NVIDIA
STATIC = 48 * 1024  # bytes of shared memory that a block has without asking


class Need(NamedTuple):
    """One kernel, compiled once."""

    kernel: str
    compiler: str
    target: str
    threads: int
    registers: int
    shared: int
    spilled: int
    name: str = ""  # which of its builds
    tolerated: int = 0  # bytes spilled that are no fault
    error: str = ""
    seconds: float = 0.0


def blocks(need: Need) -> int:
    """How many of its blocks a multiprocessor holds at once; 0 if not even one."""
    registers, shared, threads, most = LIMITS[need.target]
    rounded = max(8, -(-need.registers // 8) * 8) * need.threads
    fits = [most, registers // rounded, threads // need.threads]
    if need.shared:
        fits.append(shared // need.shared)
    return min(fits)


def faults(need: Need) -> list[str]:
    """What is over its budget, in words."""
    if need.error:
        return [need.error]
    wrong = []
    if need.spilled > need.tolerated:
        wrong.append(f"spills {need.spilled} bytes")
    most = MOST_REGISTERS.get(need.target, 255)
    if need.registers > most:
        wrong.append(f"more than {most} registers")
    shared = STATIC if need.compiler != "triton" else LIMITS[need.target][1]
    if need.shared > shared:
        wrong.append(f"more than {shared} bytes of shared memory")
    if not wrong and blocks(need) == 0:
        wrong.append(f"{need.threads} threads do not fit a multiprocessor")
    return wrong


def table(needs: Iterable[Need]) -> Iterator[str]:
    """A line for each kernel, compiler and target, with the most that any of its builds needs."""
    yield (
        f"{'kernel':34}{'compiler':9}{'target':8}{'builds':>6}{'threads':>8}{'registers':>10}"
        f"{'shared':>8}{'spilled':>8}{'blocks':>7}  "
    )

    def what(need: Need) -> tuple[str, str, str]:
        return need.compiler, need.kernel, need.target

    order = {target: i for i, target in enumerate(LIMITS)}
    ranked = sorted(needs, key=lambda n: (n.compiler, n.kernel, order[n.target]))
    for (compiler, kernel, target), group in groupby(ranked, key=what):
        same = list(group)
        wrong = "" if not any(map(faults, same)) else "  OVER"
        yield (
            f"{kernel:34}{compiler:9}{target:8}{len(same):6}{max(n.threads for n in same):8}"
            f"{max(n.registers for n in same):10}{max(n.shared for n in same):8}"
            f"{max(n.spilled for n in same):8}{min(map(blocks, same)):7}{wrong}"
        )


def verdict(needs: Iterable[Need]) -> list[str]:
    """A line for each build that is over its budget."""
    return [
        f"{need.compiler}, {need.target}: {need.name or need.kernel}: {', '.join(wrong)}"
        for need in needs
        if (wrong := faults(need))
    ]
