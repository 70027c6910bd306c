"""Structured masks against the same masks in plain PyTorch, and against reading the scores once.

    python -m bench.run_patterns                  every row at 1 and 2 threads, about two minutes
    python -m bench.run_patterns --only 2:4 --repeats 3 --no-write

PyTorch's way to n:m is `topk` over a reshaped view and `scatter_`, to blocks a sum over a reshaped
view, `topk` and `repeat_interleave`. The floor is `torch.sum` over as many bytes. Contenders take
turns; `same` is the share of equal bits: 16-bit scores tie, and PyTorch breaks ties as it likes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.timing import Row, interleave, use_threads, write_results
from paikern import ops

SEED = 0
THREADS = (1, 2)
LINEAR, CONV = (8192, 4096), (512, 512, 3, 3)
RESNET20 = [(16, 3, 3, 3), *[(16, 16, 3, 3)] * 6, (32, 16, 3, 3), *[(32, 32, 3, 3)] * 5]
RESNET20 += [(64, 32, 3, 3), *[(64, 64, 3, 3)] * 5, (10, 64)]


class Case(NamedTuple):
    """One pattern on scores of these shapes."""

    pattern: str
    shapes: list[tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def size(self) -> str:
        shape = "x".join(map(str, self.shapes[0])) if len(self.shapes) == 1 else "resnet20"
        layout = " channels_last" if self.channels_last else ""
        return f"{shape} {str(self.dtype).removeprefix('torch.')}{layout}"


CASES = [
    *[Case(pattern, [LINEAR]) for pattern in ("2:4", "1:4", "1:2", "4:8", "8:16", "2:5")],
    *[Case("2:4", [LINEAR], dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)],
    Case("2:4", [CONV]),
    Case("2:4", [CONV], channels_last=True),
    Case("2:4", RESNET20),
    Case("block:16x16", [LINEAR]),
    Case("block:16x16", [LINEAR], torch.bfloat16),
    Case("block:1x4096", [LINEAR]),
]
KEEP = 0.1  # of blocks


def sizes_of(pattern: str, mark: str) -> tuple[int, int]:
    left, right = pattern.removeprefix("block:").split(mark)
    return int(left), int(right)


def ours(case: Case, scores: list[Tensor]) -> Callable[[], list[Tensor]]:
    if not case.pattern.startswith("block"):
        n, m = sizes_of(case.pattern, ":")
        return lambda: ops.nm_mask(scores, n, m, absolute=True)
    block = sizes_of(case.pattern, "x")

    def blocks() -> list[Tensor]:
        means = ops.block_means(scores[0], block, absolute=True)
        (best,) = ops.topk_mask(means, int(KEEP * means.numel()))
        return [ops.expand_blocks(best, scores[0].shape, block)]

    return blocks


def pytorch(case: Case, scores: list[Tensor]) -> Callable[[], list[Tensor]]:
    if not case.pattern.startswith("block"):
        n, m = sizes_of(case.pattern, ":")
        return lambda: [groups_in_pytorch(s, n, m) for s in scores]
    high, wide = sizes_of(case.pattern, "x")

    def blocks() -> list[Tensor]:
        w = scores[0]
        down, across = w.shape[0] // high, w.shape[1] // wide
        sums = w.abs().view(down, high, across, wide).sum((1, 3), dtype=torch.float64)
        best = torch.zeros(sums.numel(), dtype=torch.bool)
        best[sums.flatten().topk(int(KEEP * sums.numel())).indices] = True
        rows = best.view(down, across).repeat_interleave(wide, 1)
        return [rows.repeat_interleave(high, 0)]

    return blocks


def groups_in_pytorch(scores: Tensor, n: int, m: int) -> Tensor:
    last = scores.abs().movedim(1, -1)
    whole = last.shape[-1] // m * m
    groups = last[..., :whole].reshape(*last.shape[:-1], -1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, groups.topk(n, -1).indices, True)
    parts = [mask.flatten(-2)]
    if rest := last.shape[-1] - whole:
        left = torch.zeros_like(last[..., whole:], dtype=torch.bool)
        best = last[..., whole:].topk((rest * n + m - 1) // m, -1).indices
        parts.append(left.scatter_(-1, best, True))
    return torch.cat(parts, -1).movedim(-1, 1)


def measure(case: Case, threads: int, repeats: int) -> Row:
    """Time one case; returns its row of the results."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(SEED)
    scores = [torch.randn(shape, generator=generator).to(case.dtype) for shape in case.shapes]
    if case.channels_last:
        scores = [s.contiguous(memory_format=torch.channels_last) for s in scores]
    as_float = [torch.randn(s.numel() * s.element_size() // 4) for s in scores]
    mine, theirs = ours(case, scores), pytorch(case, scores)
    found = [ops.unpack_mask(b, s.shape) for b, s in zip(mine(), scores, strict=True)]
    same = statistics.fmean(
        float((a == b).float().mean()) for a, b in zip(found, theirs(), strict=True)
    )
    times = interleave(
        {"ours": mine, "pytorch": theirs, "floor": lambda: [f.sum() for f in as_float]},
        repeats=repeats,
    )
    seconds = {name: statistics.median(samples) for name, samples in times.items()}
    kept = sum(int(mask.sum()) for mask in found)
    return {
        "op": "nm_mask" if ":" in case.pattern and "x" not in case.pattern else "block_mask",
        "pattern": case.pattern,
        "size": case.size,
        "threads": threads,
        "sparsity": 1 - kept / sum(s.numel() for s in scores),
        "seconds": seconds["ours"],
        "reference_seconds": seconds["pytorch"],
        "ratio": seconds["pytorch"] / seconds["ours"],
        "floor_seconds": seconds["floor"],
        "times_floor": seconds["ours"] / seconds["floor"],
        "same": same,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table, write `bench/results/patterns.json`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.run_patterns", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="one pattern instead of all")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each contender")
    parser.add_argument("--no-write", action="store_true", help="leave the results file alone")
    given = parser.parse_args(arguments)
    use_threads("bench.run_patterns", max(THREADS), arguments)

    cases = [case for case in CASES if given.only in (None, case.pattern)]
    if not cases:
        parser.error(f"--only: no pattern {given.only}")
    rows = [measure(case, threads, given.repeats) for threads in THREADS for case in cases]
    table = Table(title="Structured masks: paikern, PyTorch, one read of the scores")
    for column in ("pattern", "scores", "threads", "ms", "PyTorch ms", "ratio", "floor", "same"):
        table.add_column(column, justify="left" if column in ("pattern", "scores") else "right")
    for row in rows:
        table.add_row(
            row["pattern"],
            row["size"],
            str(row["threads"]),
            f"{1e3 * row['seconds']:.3f}",
            f"{1e3 * row['reference_seconds']:.2f}",
            f"{row['ratio']:.1f}x",
            f"{row['times_floor']:.2f}x",
            f"{row['same']:.4%}",
        )
    Console().print(table)
    if not given.no_write:
        print(write_results("patterns", rows, threads=max(THREADS), seeds=[SEED]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
