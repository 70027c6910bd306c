"""Convolutions with packed weights against oneDNN's dense ones, on the CPU.

    python -m bench.run_masked_conv                         the whole grid, some 7 minutes
    python -m bench.run_masked_conv --quick                 a minute, into out/bench
    python -m bench.run_masked_conv --layers 256x256x3x3@14 --sparsities 0.95 --no-write

A layer is out x in x rows x columns of the kernel @ size of the map, with "/2" for a stride of 2;
padding keeps the size. Dense contenders: `F.conv2d` with contiguous maps and with channels_last
ones, weights laid out alike; the better one counts. "dispatch" is what `pk.sparsify` leaves: the
packed layer, or the better dense one where packing is expected to lose. Contenders run in turn for
`--seconds` a point and each gets its fastest time. Writes masked_conv.json.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import paikern as pk
from bench import options
from bench.run_masked_linear import fastest
from bench.timing import RESULTS, Row, use_threads, write_results
from paikern.backends.masked_conv_cost import estimate_conv

MODULE = "bench.run_masked_conv"
# ResNet-50's stages, VGG-16's third, fourth and fifth.
LAYERS = (
    "64x64x3x3@56",
    "128x128x3x3@28",
    "256x256x3x3@14",
    "512x512x3x3@7",
    "128x128x3x3@56/2",
    "256x64x1x1@56",
    "512x128x1x1@28",
    "1024x256x1x1@14",
    "512x2048x1x1@7",
    "1024x512x1x1@28/2",
    "256x256x3x3@56",
    "512x512x3x3@14",
)
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
BATCHES = (1, 8, 32)
SEED = 0
DENSE = ("onednn", "onednn channels_last")

Contenders = dict[str, Callable[[], object]]


class Layer(NamedTuple):
    name: str
    rows: int
    channels: int
    kernel: tuple[int, int]
    size: int
    stride: int

    @property
    def padding(self) -> tuple[int, int]:
        return self.kernel[0] // 2, self.kernel[1] // 2

    def estimate(self, kept: int, batch: int, *, training: bool) -> str:
        return estimate_conv(
            "cpu",
            self.rows,
            self.channels,
            self.kernel,
            (self.size, self.size),
            kept,
            batch,
            stride=(self.stride, self.stride),
            padding=self.padding,
            training=training,
        ).kernel


def layer(text: str) -> Layer:
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)@(\d+)(?:/(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 64x64x3x3@56 or 64x64x3x3@56/2")
    rows, channels, high, wide, size = (int(n) for n in found.groups()[:5])
    return Layer(text, rows, channels, (high, wide), size, int(found[6] or 1))


def forward(made: Layer, weight: Tensor, packed: pk.PackedWeight, x: Tensor) -> Contenders:
    conv = {"stride": made.stride, "padding": made.padding}
    last, weight_last = (t.to(memory_format=torch.channels_last) for t in (x, weight))
    return {
        "paikern": lambda: pk.ops.masked_conv2d(x, packed, kernel=made.kernel, **conv),
        "onednn": lambda: F.conv2d(x, weight, **conv),
        "onednn channels_last": lambda: F.conv2d(last, weight_last, **conv),
    }


def backward(made: Layer, weight: Tensor, packed: pk.PackedWeight, x: Tensor) -> Contenders:
    """dX and the gradient of the weight: dense for oneDNN, of the kept values for us."""
    stride, padding = [made.stride] * 2, list(made.padding)
    g = torch.randn_like(F.conv2d(x, weight, None, stride, padding))
    where, values = packed.where(transposed=True), packed.values.detach()
    conv, size = (list(made.kernel), stride, padding, [1, 1], 1), list(x.shape[2:])
    ops = torch.ops.paikern

    def dense(g: Tensor, x: Tensor, weight: Tensor) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            g, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, [True, True, False]
        )

    return {
        "paikern": lambda: (
            ops.masked_conv2d_input(g, values, *where, *conv, size),
            ops.masked_conv2d_kept(g, x, *where, *conv),
        ),
        "onednn": dense(g, x, weight),
        "onednn channels_last": dense(
            *(t.to(memory_format=torch.channels_last) for t in (g, x, weight))
        ),
    }


def measure(
    layers: Iterable[Layer],
    sparsities: Iterable[float],
    batches: Iterable[int],
    seconds: float,
    steps: Sequence[str],
) -> list[Row]:
    rows: list[Row] = []
    for made in layers:
        torch.manual_seed(SEED)
        weight = torch.randn(made.rows, made.channels, *made.kernel)
        for sparsity in sparsities:
            mask = torch.rand_like(weight) >= sparsity
            packed = pk.PackedWeight.from_dense(weight.flatten(1), mask.flatten(1))
            for batch in batches:
                x = torch.randn(batch, made.channels, made.size, made.size)
                for step in steps:
                    build = forward if step == "forward" else backward
                    contenders = build(made, weight * mask, packed, x)
                    best = fastest(contenders, seconds)
                    kernel = made.estimate(packed.nnz, batch, training=step == "backward")
                    rows.append(row_of(step, made, sparsity, batch, kernel, best))
                    print(line_of(rows[-1]), file=sys.stderr, flush=True)
                    del contenders
                    gc.collect()
    return rows


def row_of(
    step: str, made: Layer, sparsity: float, batch: int, kernel: str, best: Mapping[str, float]
) -> Row:
    reference = min(DENSE, key=lambda name: best[name])
    dispatch = best[reference] if kernel == "dense" else best["paikern"]
    return {
        "op": f"masked_conv2d {step}",
        "size": made.name,
        "batch": batch,
        "sparsity": sparsity,
        "kernel": kernel,
        "seconds": best["paikern"],
        "reference": reference,
        "reference_seconds": best[reference],
        "ratio": best[reference] / best["paikern"],
        "all_seconds": {**best, "dispatch": dispatch},
    }


def line_of(row: Row) -> str:
    times = "  ".join(f"{name} {1e3 * s:.3f}" for name, s in row["all_seconds"].items())
    return (
        f"{row['op'].split()[1]:8} {row['size']:18} {row['sparsity']:.3f} N={row['batch']:<3} "
        f"{row['kernel']:6} {row['ratio']:6.2f}x {row['reference']}  ms: {times}"
    )


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", nargs="+", type=layer, default=[layer(n) for n in LAYERS])
    parser.add_argument("--sparsities", nargs="+", type=options.fraction, default=SPARSITIES)
    parser.add_argument("--batches", nargs="+", type=options.count, default=BATCHES)
    parser.add_argument("--seconds", type=options.positive, default=0.6, help="a point")
    parser.add_argument(
        "--steps", nargs="+", choices=("forward", "backward"), default=["forward", "backward"]
    )
    parser.add_argument("--threads", type=int, choices=(1, 2), default=2)
    parser.add_argument("--quick", action="store_true", help="small and short, into out/bench")
    parser.add_argument("--out", type=Path, help="folder of masked_conv.json")
    parser.add_argument("--no-write", action="store_true")
    given = parser.parse_args(arguments)
    if given.quick:
        given.layers = [layer(n) for n in ("64x64x3x3@56", "256x256x3x3@14", "1024x256x1x1@14")]
        given.sparsities, given.batches, given.seconds = (0.8, 0.95), (1, 8), 0.3
    root = Path(__file__).parents[1]
    given.out = given.out or (root / "out" / "bench" if given.quick else RESULTS)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = parse(arguments)
    use_threads(MODULE, given.threads, arguments)
    rows = measure(given.layers, given.sparsities, given.batches, given.seconds, given.steps)
    if not given.no_write:
        print(
            write_results(
                "masked_conv", rows, threads=given.threads, seeds=[SEED], folder=given.out
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
