"""Packed weights against dense libraries and torch's CSR, on the CPU.

    python -m bench.run_masked_linear                         everything, a quarter of an hour
    python -m bench.run_masked_linear --quick                 a minute, into out/bench
    python -m bench.run_masked_linear --sizes 4096 11008x4096 --batches 256 --no-write
    python -m bench.run_masked_linear --sizes 8192 --update   these points again, the others stay
    python -m bench.run_masked_linear --report-only           page and plot again, from the results
    python -m bench.run_masked_linear --fit bench/results/masked_linear.json

Dense contenders: torch (MKL), oneDNN with a weight laid out beforehand, numpy (OpenBLAS); the best
of them counts. `dispatch` is what `pk.sparsify` would leave in the model by `masked_cost.estimate`.
Contenders run in turn for `--seconds` a point, twice in a row each, and each gets its fastest time:
on a machine with other work the median is that of the other work. Who takes more than half a second
runs once. Writes masked_linear.json into the folder of `--out`; with the default folder,
bench/results, the page is bench/masked_linear.md and the plot docs/images/masked_linear.png.

`--fit` measures nothing: it holds the constants of `paikern.backends.masked_cost` against a results
file and says by how much they are wrong, and what wrong choices cost.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import paikern as pk
from bench import masked_linear_report, options
from bench.masked_linear_steps import memory
from bench.masked_linear_steps import step as training_step
from bench.timing import RESULTS, Row, use_threads, write_results
from paikern.backends import masked_cost

MODULE = "bench.run_masked_linear"
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
# [out, in] of 1x1 convolutions of ResNet-50, of ViT-B and of Llama-7B
LAYERS = ("64x256", "512x2048", "2048x1024", "2304x768", "3072x768", "768x3072")
STEPS = ("forward", "backward", "step")
SEED = 0
MEMORY_SIZE = 2048  # quantile() takes 16 million values at most


class Part(NamedTuple):
    """Every combination of its values is a point."""

    sizes: Sequence[str]
    sparsities: Sequence[float]
    batches: Sequence[int]
    steps: Sequence[str]


PLAN = (
    Part(("4096",), SPARSITIES, (1, 4, 16, 32, 64, 256, 1024), STEPS[:2]),
    Part(("4096",), (0.9, 0.95, 0.99), (32, 256, 1024), STEPS[2:]),
    Part(("1024",), SPARSITIES, (1, 32, 256, 4096), STEPS[:2]),
    Part(("2048", *LAYERS), (0.5, 0.8, 0.9, 0.95, 0.99), (1, 32, 256, 1024), STEPS[:2]),
    Part(("8192", "11008x4096", "4096x11008"), (0.9, 0.95, 0.99), (1, 32, 256), STEPS[:2]),
)
ONCE = 0.5  # seconds: who takes longer does not run again
DENSE = ("mkl", "onednn", "openblas")
ROOT = Path(__file__).parents[1]

Contenders = dict[str, Callable[[], object]]


def onednn_linear(weight: Tensor, batch: int) -> Callable[[Tensor], Tensor]:
    """oneDNN's x @ weight.T with the weight in the layout that it likes best."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def forward(weight: Tensor, packed: pk.PackedWeight, x: Tensor) -> Contenders:
    dense = packed.to_dense().detach()
    csr = dense.to_sparse_csr()
    onednn = onednn_linear(dense, x.shape[0])
    a, b = x.numpy(), dense.numpy()
    return {
        "paikern": lambda: pk.ops.masked_linear(x, packed),
        "dispatch": (
            (lambda: F.linear(x, dense))
            if kernel_of("forward", packed, x.shape[0]) == "dense"
            else (lambda: pk.ops.masked_linear(x, packed))
        ),
        "mkl": lambda: F.linear(x, dense),
        "onednn": lambda: onednn(x),
        "openblas": lambda: a @ b.T,
        "csr": lambda: csr @ x.T,
        "masked each call": lambda: F.linear(x, weight * (dense != 0)),
    }


def backward(weight: Tensor, packed: pk.PackedWeight, x: Tensor) -> Contenders:
    """dX and the gradient of the weight: dense for the libraries, of the kept values for us."""
    dense = packed.to_dense().detach()
    g = torch.randn(x.shape[0], weight.shape[0])
    onednn = onednn_linear(dense.T, x.shape[0])
    a, b, c = x.numpy(), dense.numpy(), g.numpy()
    where, values = packed.where(transposed=True), packed.values.detach()
    ops = torch.ops.paikern

    def outer() -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(g.T, x.T, None, "none", [], "")

    def ours() -> tuple[Tensor, Tensor]:
        return (
            ops.masked_linear_input(g, values, *where),
            ops.masked_linear_kept(g, x, *where),
        )

    def mkl() -> tuple[Tensor, Tensor]:
        return g @ dense, g.T @ x

    return {
        "paikern": ours,
        "dispatch": mkl if kernel_of("backward", packed, x.shape[0]) == "dense" else ours,
        "mkl": mkl,
        "onednn": lambda: (onednn(g), outer()),
        "openblas": lambda: (c @ b, c.T @ a),
    }


BUILD = {"forward": forward, "backward": backward, "step": training_step}


def kernel_of(step: str, packed: pk.PackedWeight, batch: int) -> str:
    rows, columns = packed.shape
    return masked_cost.estimate(
        "cpu", rows, columns, packed.nnz, batch, training=step != "forward"
    ).kernel


def fastest(contenders: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The fastest run of each, run in turn until `seconds` have passed, three times at least.

    OpenBLAS comes last, by itself: its threads go on spinning for a tenth of a second after a call,
    on the cores of whoever is next.
    """
    best = dict.fromkeys(contenders, float("inf"))
    together = [name for name in contenders if name != "openblas"]
    alone = [name for name in contenders if name == "openblas"]
    with torch.no_grad():
        for names, limit in ((together, seconds), (alone, seconds / 4)):
            end, rounds = time.perf_counter() + limit, 0
            while names and (rounds < 3 or time.perf_counter() < end):
                for name in names if rounds % 2 else reversed(names):
                    for _ in range(2):
                        if ONCE < best[name] < float("inf"):
                            break
                        start = time.perf_counter()
                        contenders[name]()
                        best[name] = min(best[name], time.perf_counter() - start)
                rounds += 1
    time.sleep(0.2 if alone else 0)
    return best


def measure(parts: Sequence[Part], seconds: float) -> list[Row]:
    rows: list[Row] = []
    for part in parts:
        for size, sparsity in itertools.product(part.sizes, part.sparsities):
            torch.manual_seed(SEED)
            shape = shape_of(size)
            weight, kept = torch.randn(shape), torch.rand(shape) >= sparsity
            packed = pk.PackedWeight.from_dense(weight, kept)
            for batch, step in itertools.product(part.batches, part.steps):
                x = torch.randn(batch, shape[1])
                contenders = BUILD[step](weight, packed, x)
                best = fastest(contenders, seconds)
                kernel = kernel_of(step, packed, batch)
                rows.append(row_of(step, size, sparsity, batch, best, kernel))
                print(line_of(rows[-1]), file=sys.stderr, flush=True)
                del contenders
                gc.collect()
    return rows


def shape_of(size: str) -> tuple[int, int]:
    """(out, in) of "4096" or "11008x4096"."""
    rows, _, columns = size.partition("x")
    return int(rows), int(columns or rows)


def row_of(
    step: str, size: str, sparsity: float, batch: int, best: Mapping[str, float], kernel: str
) -> Row:
    reference = min((name for name in DENSE if name in best), key=lambda name: best[name])
    return {
        "op": f"masked_linear {step}",
        "size": "{}x{}".format(*shape_of(size)),
        "batch": batch,
        "sparsity": sparsity,
        "seconds": best["paikern"],
        "reference": reference,
        "reference_seconds": best[reference],
        "ratio": best[reference] / best["paikern"],
        "all_seconds": dict(best),
        "kernel": kernel,
    }


def line_of(row: Row) -> str:
    times = "  ".join(f"{name} {1e3 * s:.3f}" for name, s in row["all_seconds"].items())
    return (
        f"{row['op'].split()[1]:8} {row['size']} {row['sparsity']:.3f} N={row['batch']:<5} "
        f"{row['ratio']:6.2f}x {row['reference']} {row['kernel']}  ms: {times}"
    )


def size_text(text: str) -> str:
    try:
        if min(shape_of(text)) >= 1:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"a size is 4096 or 11008x4096, got {text!r}")


def fit(path: Path) -> list[str]:
    """How far the predicted times are off, and what wrong choices cost."""
    errors, regrets = [], []
    for row in json.loads(path.read_text())["rows"]:
        if row["op"].endswith("step"):  # the optimizer's share is not in the table
            continue
        rows, columns = shape_of(row["size"])
        kept, batch = round((1 - row["sparsity"]) * rows * columns), row["batch"]
        backward = row["op"].endswith("backward")
        cell = f"{row['op'].split()[1]} {row['size']} {row['sparsity']:g} N={batch}"
        bits = kept > masked_cost.BITMAP_DENSITY * rows * columns
        sizes = (rows, columns, kept, batch)
        packed = masked_cost.packed(*sizes, bits=bits, training=backward)[1]
        dense = masked_cost.dense_seconds(rows, columns, batch, training=backward)
        if backward:  # a training step but for its forward pass
            packed -= masked_cost.packed(*sizes, bits=bits)[1]
            dense -= masked_cost.dense_seconds(rows, columns, batch)
        for what, predicted, seconds in (
            ("packed", packed, row["seconds"]),
            ("dense", dense, row["reference_seconds"]),
        ):
            errors.append((abs(math.log(predicted / seconds)), what, cell, predicted, seconds))
        found = masked_cost.estimate("cpu", rows, columns, kept, batch, training=backward)
        taken = row["reference_seconds"] if found.kernel == "dense" else row["seconds"]
        best = min(row["seconds"], row["reference_seconds"])
        regrets.append((taken / best, cell, found.kernel, row["seconds"], row["reference_seconds"]))
    lines = []
    for what in ("packed", "dense"):
        off = sorted((e for e in errors if e[1] == what), reverse=True)
        typical = math.exp(off[len(off) // 2][0])
        lines.append(f"{what}: {len(off)} cells, half of them within {typical:.2f}x; the worst:")
        lines += [
            f"  {math.exp(error):5.2f}x  {cell}: predicted {1e3 * predicted:.3f} ms, "
            f"measured {1e3 * seconds:.3f} ms"
            for error, _, cell, predicted, seconds in off[:12]
        ]
    wrong = sorted((r for r in regrets if r[0] > masked_cost.LOSS), reverse=True)
    for what, cells in (
        ("packed where dense is faster", [r for r in wrong if r[2] != "dense"]),
        ("dense where packed is faster", [r for r in wrong if r[2] == "dense"]),
    ):
        lines.append(f"{what}, by more than 5 %: {len(cells)} of {len(regrets)}; the worst:")
        lines += [
            f"  {ratio:5.2f}x  {cell}: {kernel}, packed {1e3 * ours:.3f} ms, "
            f"dense {1e3 * dense:.3f} ms"
            for ratio, cell, kernel, ours, dense in cells[:12]
        ]
    return lines


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", type=size_text, help="these points only")
    parser.add_argument("--sparsities", nargs="+", type=options.fraction)
    parser.add_argument("--batches", nargs="+", type=options.count)
    parser.add_argument("--steps", nargs="+", choices=STEPS)
    parser.add_argument("--seconds", type=options.positive, default=0.6, help="a point")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=2)
    parser.add_argument("--quick", action="store_true", help="small and short, into out/bench")
    parser.add_argument("--out", type=Path, help="folder of masked_linear.json")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--update", action="store_true", help="keep the other points of the file")
    parser.add_argument("--report-only", action="store_true", help="page and plot from the results")
    parser.add_argument("--fit", type=Path, help="check the constants against this results file")
    given = parser.parse_args(arguments)
    chosen = [given.sizes, given.sparsities, given.batches, given.steps]
    partial = given.quick or any(chosen)
    if given.quick:
        given.parts = [Part(["1024"], (0.5, 0.9, 0.99), (1, 32, 256), STEPS)]
        given.seconds = 0.3
    elif partial:
        defaults = (["4096"], SPARSITIES, (1, 32, 256), STEPS[:2])
        given.parts = [Part(*(c or d for c, d in zip(chosen, defaults, strict=True)))]
    else:
        given.parts = PLAN
    aside = partial and not given.update
    given.out = given.out or (ROOT / "out" / "bench" if aside else RESULTS)
    if given.update and not (given.out / "masked_linear.json").is_file():
        parser.error(f"--update: there is no masked_linear.json in {given.out}")
    return given


def updated(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The old rows with those of the same points replaced."""
    found = {tuple(r[key] for key in ("op", "size", "sparsity", "batch")): r for r in (*old, *new)}
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = parse(arguments)
    if given.fit:
        print("\n".join(fit(given.fit)))
        return 0
    if not given.report_only:
        use_threads(MODULE, given.threads, arguments)
    path = given.out / "masked_linear.json"
    if not given.report_only:
        rows = measure(given.parts, given.seconds)
        if given.no_write:
            return 0
        if given.update:
            rows = updated(json.loads(path.read_text())["rows"], rows)
        held = {"memory": [memory(MEMORY_SIZE, sparsity) for sparsity in (0.9, 0.95, 0.99)]}
        print(
            write_results(
                path.stem, rows, threads=given.threads, seeds=[SEED], folder=given.out, more=held
            )
        )
    page, plot = path.with_suffix(".md"), path.with_suffix(".png")
    if given.out.resolve() == RESULTS.resolve():
        page, plot = ROOT / "bench/masked_linear.md", ROOT / "docs/images/masked_linear.png"
    masked_linear_report.write(path, page, plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
