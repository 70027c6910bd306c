"""The GPU benchmark: how near kernels come to the speed of a copy, and to others.

    python -m bench.run_gpu --out DIR             on a GPU, about four minutes; DIR/gpu.json
    python -m bench.run_gpu --out DIR --tiny      a trial of the benchmark, on the CPU too

First the bandwidth of a copy in the device's memory is measured, bytes read and written; every row
says what fraction of it was reached. Contenders take turns; inputs are random, and as many as no
cache holds. A part that does not come to its end in its time is named in the results.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import gpu_cub, gpu_masked_linear, gpu_runs, gpu_selection, gpu_sweeps
from bench.gpu_clock import Clock, copy_bandwidth
from bench.options import positive
from bench.timing import Row, write_results
from paikern.backends import registry

PREFERRED = ("cuda", "triton")
PARTS = ("sweeps", "selection", "masked_linear", "synflow", "dpai", "stacks")
TINY = {"sizes": (20_000,), "copy": 4 << 20}
FULL = {"sizes": (10_000_000, 100_000_000, 1_000_000_000), "copy": 4 << 30}


def backends(device: str) -> list[str]:
    """Those that are compared: of a GPU CUDA (built, else compiled when used) and Triton."""
    if device == "cpu":
        return ["cpu"]
    usable = {row["name"] for row in registry.backends() if row["usable"]}
    found = [name for name in PREFERRED if name in usable]
    if "cuda" not in usable and "cuda_jit" in usable:
        found.insert(0, "cuda_jit")
    return found


class Benchmark:
    """Runs the parts one after the other and keeps their rows."""

    def __init__(self, device: str, tiny: bool, seconds: float) -> None:
        self.device, self.tiny = device, tiny
        self.began, self.seconds = time.perf_counter(), seconds
        self.clock = Clock(device, 0.05 if tiny else 0.4, 3 if tiny else 30)
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.names = backends(device)
        self.bandwidth = copy_bandwidth(self.clock, (TINY if tiny else FULL)["copy"])
        say(f"copy: {self.bandwidth / 1e9:.0f} GB/s read and written")

    def run(self, parts: Sequence[str]) -> None:
        for part in parts:
            for title, rows in getattr(self, part)():
                left = self.seconds - (time.perf_counter() - self.began)
                if left <= 0:
                    self.left_out.append(f"{title}: no time left")
                    continue
                try:
                    for row in rows():
                        self.rows.append(row)
                        say(line(row))
                except Exception as error:  # the other parts are measured all the same
                    words = (str(error).splitlines() or [""])[0]
                    self.left_out.append(f"{title}: {type(error).__name__}: {words}")
                    say(self.left_out[-1])
                if self.clock.on_gpu:
                    torch.cuda.empty_cache()

    Part = Iterator[tuple[str, Callable[[], Iterator[Row]]]]

    def sweeps(self) -> Part:
        sizes = gpu_sweeps.Sizes((1,), 256, 64) if self.tiny else gpu_sweeps.Sizes()
        for megabytes in sizes.megabytes:
            for kind in gpu_sweeps.TYPES:
                yield (
                    f"layer of {megabytes} MB, {kind}",
                    lambda m=megabytes, k=kind: gpu_sweeps.layer(
                        self.clock, self.names, m, k, sizes.columns, self.bandwidth
                    ),
                )
        for name in gpu_sweeps.STACKS:
            yield (
                f"stack {name}",
                lambda n=name: gpu_sweeps.stack(self.clock, self.names, n, sizes, self.bandwidth),
            )

    def selection(self) -> Part:
        cub = None
        if self.clock.on_gpu:
            try:
                cub = gpu_cub.compiled(arch(self.device))
                say(f"{cub.name} of CCCL {cub.version}")
            except RuntimeError as error:
                self.left_out.append(f"CUB: {error}")
        sizes = (TINY if self.tiny else FULL)["sizes"]
        for n in sizes:
            for kind in gpu_selection.TYPES:
                yield (
                    f"selection of {n:,}, {kind}",
                    lambda n=n, k=kind: gpu_selection.dense(
                        self.clock, self.names, n, k, self.bandwidth, cub
                    ),
                )
                yield (
                    f"factored selection of {n:,}, {kind}",
                    lambda n=n, k=kind: gpu_selection.factored(
                        self.clock, self.names, n, k, self.bandwidth
                    ),
                )

    def masked_linear(self) -> Part:
        sizes = gpu_masked_linear.TINY if self.tiny else gpu_masked_linear.Sizes()
        clock = Clock(self.device, self.clock.seconds / 4, self.clock.most)
        for shape, sparsity in itertools.product(sizes.shapes, sizes.sparsities):
            yield (
                f"packed {shape[0]}x{shape[1]}, {sparsity:.0%} pruned",
                lambda h=shape, s=sparsity: gpu_masked_linear.point(
                    clock, self.names, h, s, sizes, self.bandwidth
                ),
            )

    @property
    def effort(self) -> gpu_runs.Effort:
        if not self.tiny:
            return gpu_runs.Effort()
        return gpu_runs.Effort("resnet20", 10, 2, 3, 2, 64, 96, 2, (1, 2))

    def synflow(self) -> Part:
        yield "SynFlow", lambda: gpu_runs.synflow_run(self.clock, self.effort, self.bandwidth)

    def dpai(self) -> Part:
        yield "DPaI", lambda: gpu_runs.dpai_steps(self.clock, self.effort, self.bandwidth)

    def stacks(self) -> Part:
        yield "7B stack", lambda: gpu_runs.synflow_round(self.clock, self.effort, self.bandwidth)

    def head(self) -> dict[str, Any]:
        """What a results file says before its rows."""
        return {
            "schema_version": 1,
            "device": self.device,
            "gpu": gpu(self.device),
            "backends": registry.backends(),
            "copy_bandwidth": self.bandwidth,
            "tiny": self.tiny,
            "left_out": self.left_out,
        }


def line(row: Row) -> str:
    what = row.get("kernel") or row["method"]
    size = row.get("size") or row["model"]
    kind = f"{row['dtype']} " if "dtype" in row else ""
    who = f"{row['backend']} " if "backend" in row else ""
    return (
        f"{row['op']:13} {what:14} {kind}{size}: {who}{1e3 * row['seconds']:.3f} ms, "
        f"{row['bandwidth_fraction']:.0%} of a copy, {row['ratio']:.2f}x {row['reference']}"
    )


def say(words: str) -> None:
    print(words, flush=True)


def arch(device: str) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def gpu(device: str) -> dict[str, Any] | None:
    """What the figures depend on, as the driver and torch tell it."""
    if device == "cpu":
        return None
    about = torch.cuda.get_device_properties(device)
    found = {
        "name": about.name,
        "memory": about.total_memory,
        "multiprocessors": about.multi_processor_count,
        "l2": getattr(about, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def summary(rows: Sequence[Row], left_out: Sequence[str]) -> list[str]:
    """Each measurement once, with the best rival beside it."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = tuple(
            str(row.get(name)) for name in ("kernel", "method", "backend", "size", "model", "dtype")
        )
        if key not in best or row["ratio"] < best[key]["ratio"]:
            best[key] = row
    return [*map(line, best.values()), *(f"left out: {words}" for words in left_out)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=positive, default=270.0, help="no part begins after")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small sizes, a trial of the benchmark")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if given.device == "cpu" and not given.tiny:
        print("run_gpu: no GPU that this build of torch can use; --tiny for a trial on the CPU")
        return 2
    bench = Benchmark(given.device, given.tiny, given.seconds)
    try:
        bench.run(given.only)
    finally:
        path = write_results(
            "gpu", bench.rows, threads=torch.get_num_threads(), seeds=[0], folder=given.out,
            more=bench.head(),
        )  # fmt: skip
    print(*summary(bench.rows, bench.left_out), path, sep="\n")
    return 1 if not bench.rows else 0


if __name__ == "__main__":
    raise SystemExit(main())
