"""Packed weights against dense libraries and torch's CSR, on the CPU.

    python -m bench.run_masked_linear                         the whole grid, some 15 minutes
    python -m bench.run_masked_linear --quick                 a minute, into out/bench
    python -m bench.run_masked_linear --batches 256 --sparsities 0.95 --no-write

Dense contenders: torch (MKL), oneDNN with a weight laid out beforehand, numpy (OpenBLAS); the best
of them counts. Contenders run in turn for `--seconds` a point and each gets its fastest time: on a
machine with other work the median is that of the other work. Writes masked_linear.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import paikern as pk
from bench import options
from bench.timing import RESULTS, Row, use_threads, write_results

MODULE = "bench.run_masked_linear"
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
BATCHES = (1, 4, 16, 32, 64, 256, 1024)
SEED = 0
DENSE = ("mkl", "onednn", "openblas")

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

    return {
        "paikern": lambda: (
            ops.masked_linear_input(g, values, *where),
            ops.masked_linear_kept(g, x, *where),
        ),
        "mkl": lambda: (g @ dense, g.T @ x),
        "onednn": lambda: (onednn(g), outer()),
        "openblas": lambda: (c @ b, c.T @ a),
    }


def fastest(contenders: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """The fastest run of each, run in turn until `seconds` have passed, three times at least."""
    best = dict.fromkeys(contenders, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    with torch.no_grad():
        while rounds < 3 or time.perf_counter() < end:
            for name in contenders if rounds % 2 else reversed(contenders):
                start = time.perf_counter()
                contenders[name]()
                best[name] = min(best[name], time.perf_counter() - start)
            rounds += 1
    return best


def measure(
    sizes: Iterable[int],
    sparsities: Iterable[float],
    batches: Iterable[int],
    seconds: float,
    steps: Sequence[str],
) -> list[Row]:
    rows: list[Row] = []
    for size in sizes:
        torch.manual_seed(SEED)
        weight = torch.randn(size, size)
        for sparsity in sparsities:
            packed = pk.PackedWeight.from_dense(weight, torch.rand(size, size) >= sparsity)
            for batch in batches:
                x = torch.randn(batch, size)
                for step in steps:
                    build = forward if step == "forward" else backward
                    contenders = build(weight, packed, x)
                    best = fastest(contenders, seconds)
                    rows.append(row_of(step, size, sparsity, batch, best))
                    print(line_of(rows[-1]), file=sys.stderr, flush=True)
                    del contenders
                    gc.collect()
    return rows


def row_of(step: str, size: int, sparsity: float, batch: int, best: Mapping[str, float]) -> Row:
    reference = min(DENSE, key=lambda name: best[name])
    return {
        "op": f"masked_linear {step}",
        "size": f"{size}x{size}",
        "batch": batch,
        "sparsity": sparsity,
        "seconds": best["paikern"],
        "reference": reference,
        "reference_seconds": best[reference],
        "ratio": best[reference] / best["paikern"],
        "all_seconds": dict(best),
    }


def line_of(row: Row) -> str:
    times = "  ".join(f"{name} {1e3 * s:.3f}" for name, s in row["all_seconds"].items())
    return (
        f"{row['op'].split()[1]:8} {row['size']} {row['sparsity']:.3f} N={row['batch']:<5} "
        f"{row['ratio']:6.2f}x {row['reference']}  ms: {times}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", type=options.count, default=[4096])
    parser.add_argument("--sparsities", nargs="+", type=options.fraction, default=SPARSITIES)
    parser.add_argument("--batches", nargs="+", type=options.count, default=BATCHES)
    parser.add_argument("--seconds", type=options.positive, default=3.0, help="a point")
    parser.add_argument(
        "--steps", nargs="+", choices=("forward", "backward"), default=["forward", "backward"]
    )
    parser.add_argument("--threads", type=int, choices=(1, 2), default=2)
    parser.add_argument("--quick", action="store_true", help="small and short, into out/bench")
    parser.add_argument("--out", type=Path, help="folder of masked_linear.json")
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args(arguments)
    if given.quick:
        given.sizes, given.sparsities, given.seconds = [1024], (0.5, 0.9, 0.99), 0.3
        given.batches = (1, 32, 256)
    root = Path(__file__).parents[1]
    given.out = given.out or (root / "out" / "bench" if given.quick else RESULTS)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = parse(arguments)
    use_threads(MODULE, given.threads, arguments)
    rows = measure(given.sizes, given.sparsities, given.batches, given.seconds, given.steps)
    if not given.no_write:
        print(
            write_results(
                "masked_linear", rows, threads=given.threads, seeds=[SEED], folder=given.out
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
