"""SNIP and GraSP on VGG-16 at 32x32 against their own passes, and against a plain loop.

    python -m bench.run_gradient [--samples 100] [--repeats 7] [--out FOLDER]
    python -m bench.run_gradient --report-only

Times are taken in one process, the three contenders in turn:
    paikern   `pk.prune(..., apply=False)`, from the model to the masks
    passes    the forward and backward passes that the method cannot do without
    plain     bench/references/gradient.py
Peak memory is taken in a process of its own each: what `paikern` and `plain` need beyond the model,
the samples and the libraries, which are loaded and have run one small batch before. There the
allocator is told to give large blocks back at once, so that the peak is that of live tensors;
otherwise it depends on how the heap happens to be cut up, by a tenth from run to run.

What is not run, a method or a part, is kept from the results file. The page is written anew from it
where results go to their own folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from bench.options import count, fraction
from bench.references import gradient as plain
from bench.references.layers import prunable_layers
from bench.timing import RESULTS, Row, interleave, use_threads, write_results

ROOT = Path(__file__).parents[1]
MODEL = "vgg16_bn"
METHODS = ("snip", "grasp")
PARTS = ("time", "memory")
TEMPERATURE = {"snip": 1.0, "grasp": 200.0}
SEED = 0
PAGE = Path(__file__).with_name("gradient.md")
TIME, MEMORY = 1.1, 0.8
"""Asked for: at most so much of the passes' time, and of the plain loop's memory."""

Data = tuple[Tensor, Tensor]


def case(samples: int) -> tuple[nn.Module, Data]:
    """The model, freshly initialised, and one batch."""
    model = pk.zoo.create(MODEL, seed=SEED, num_classes=10)
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.randn(samples, 3, 32, 32, generator=generator)
    return model.train(), (inputs, torch.arange(samples) % 10)


def passes(model: nn.Module, data: Data, method: str) -> None:
    """The gradient of the loss, and for GraSP its derivative along the gradient."""
    weights = [layer.weight for layer in prunable_layers(model).values()]

    def loss() -> Tensor:
        return F.cross_entropy(model(data[0]) / TEMPERATURE[method], data[1])

    slopes = torch.autograd.grad(loss(), weights)
    if method == "grasp":
        twice = torch.autograd.grad(loss(), weights, create_graph=True)
        z = torch.stack([(a * b).sum() for a, b in zip(slopes, twice, strict=True)]).sum()
        torch.autograd.grad(z, weights)


def runs(
    model: nn.Module, data: Data, method: str, sparsity: float
) -> dict[str, Callable[[], object]]:
    """What each contender does, by name."""
    loop = getattr(plain, method)
    return {
        "paikern": lambda: pk.prune(
            model, method, sparsity=sparsity, data=data, apply=False, on_collapse="floor"
        ),
        "passes": lambda: passes(model, data, method),
        "plain": lambda: loop(model, [data], sparsity),
    }


def measure_peak(method: str, contender: str, samples: int, sparsity: float) -> int:
    """Bytes beyond what is resident before; in the process that calls this."""
    model, data = case(samples)
    few = (data[0][:10], data[1][:10])
    runs(model, few, method, sparsity)[contender]()  # libraries load their parts when first used
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    runs(model, data, method, sparsity)[contender]()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def peak(method: str, contender: str, options: argparse.Namespace) -> int:
    """`measure_peak` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    given = ["--samples", str(options.samples), "--sparsity", str(options.sparsity)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.run_gradient", "--peak", method, contender, *given,
         "--threads", str(options.threads)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{method} of {contender} failed:\n{done.stderr}")
    return int(json.loads(done.stdout))


def timed(method: str, options: argparse.Namespace) -> Row:
    model, data = case(options.samples)
    few = (data[0][:10], data[1][:10])
    for warm in runs(model, few, method, options.sparsity).values():
        warm()
    contenders = runs(model, data, method, options.sparsity)
    times = interleave(contenders, repeats=options.repeats, warmup=0)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "method": method,
        "model": MODEL,
        "size": f"{options.samples}x3x32x32",
        "sparsity": options.sparsity,
        "seconds": seconds["paikern"],
        "reference_seconds": seconds["plain"],
        "ratio": seconds["plain"] / seconds["paikern"],
        "passes_seconds": seconds["passes"],
        "over_passes": statistics.median(
            a / b for a, b in zip(times["paikern"], times["passes"], strict=True)
        ),
        "samples": times,
    }


def weighed(method: str, options: argparse.Namespace) -> Row:
    peaks = {name: peak(method, name, options) for name in ("paikern", "plain")}
    return {
        "peak_bytes": peaks["paikern"],
        "reference_peak_bytes": peaks["plain"],
        "peak_ratio": peaks["paikern"] / peaks["plain"],
    }


def report(rows: Sequence[Row], threads: int) -> str:
    """The page."""
    lines = [
        "# SNIP and GraSP, measured",
        "",
        "Written by `python -m bench.run_gradient` from [gradient.json](results/gradient.json),",
        "which names machine and versions. What is timed and weighed stands at the head of the",
        "program: `passes` are the forward and backward passes alone, `plain` a plain PyTorch",
        "loop; peaks are beyond model, samples and libraries. VGG-16 with batch norm at 32x32,",
        f"threads: {threads}.",
        "Times are medians of runs in turn, their quotient the median of the quotients of each",
        "turn.",
    ]
    shown = {
        f"Time; asked for: at most {TIME:g}x of the passes": (
            ("paikern", "passes", "paikern / passes", "plain"),
            lambda r: (
                f"{r['seconds']:.2f} s | {r['passes_seconds']:.2f} s | {r['over_passes']:.3f}x "
                f"| {r['reference_seconds']:.2f} s | {_verdict(r['over_passes'], TIME)}"
            ),
            "over_passes",
        ),
        f"Peak memory; asked for: at most {MEMORY:g}x of the plain loop": (
            ("paikern", "plain", "paikern / plain"),
            lambda r: (
                f"{r['peak_bytes'] / 1e6:.0f} MB | {r['reference_peak_bytes'] / 1e6:.0f} MB "
                f"| {r['peak_ratio']:.2f}x | {_verdict(r['peak_ratio'], MEMORY)}"
            ),
            "peak_ratio",
        ),
    }
    for title, (columns, cells, needed) in shown.items():
        found = [row for row in rows if needed in row]
        if found:
            lines += ["", f"## {title}", "", f"| method | samples | {' | '.join(columns)} | |"]
            lines += ["|---|---:|" + "---:|" * len(columns) + "---|"]
            lines += [
                f"| {row['method']} | {row['size'].partition('x')[0]} | {cells(row)} |"
                for row in found
            ]
    return "\n".join(lines) + "\n"


def _verdict(found: float, most: float) -> str:
    return "met" if found <= most else "**missed**"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run_gradient", description=__doc__)
    parser.add_argument("--samples", type=count, default=100)
    parser.add_argument("--sparsity", type=fraction, default=0.9)
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--report-only", action="store_true", help="the page from the results")
    parser.add_argument("--peak", nargs=2, metavar=("METHOD", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.report_only:
        held = json.loads((RESULTS / "gradient.json").read_text())
        PAGE.write_text(report(held["rows"], held["threads"]))
        return
    use_threads("bench.run_gradient", options.threads, arguments)
    if options.peak:
        print(json.dumps(measure_peak(*options.peak, options.samples, options.sparsity)))
        return
    file = options.out / "gradient.json"
    held = json.loads(file.read_text())["rows"] if file.is_file() else []
    rows = {found["method"]: found for found in held}
    for method in options.methods:
        found = rows.setdefault(method, {})
        if "time" in options.parts or "seconds" not in found:  # a row needs its times
            found.update(timed(method, options))
            print(
                f"{method}: {found['seconds']:.2f} s, passes alone {found['passes_seconds']:.2f} s "
                f"({found['over_passes']:.3f}x), plain loop {found['reference_seconds']:.2f} s"
            )
        if "memory" in options.parts:
            found.update(weighed(method, options))
            print(
                f"{method}: peak {found['peak_bytes'] / 2**20:.0f} MiB, plain loop "
                f"{found['reference_peak_bytes'] / 2**20:.0f} MiB ({found['peak_ratio']:.2f}x)"
            )
    ordered = [rows[m] for m in METHODS if m in rows]
    path = write_results(
        "gradient",
        ordered,
        threads=options.threads,
        seeds=[SEED],
        folder=options.out,
    )
    print(f"wrote {path}")
    if options.out == RESULTS:
        PAGE.write_text(report(ordered, options.threads))
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
