"""NTK-SAP of paikern against the plain PyTorch loop: whole runs of 20 rounds, interleaved.

    python -m bench.run_ntk                       ResNet-20, 100 samples, 2 threads
    python -m bench.run_ntk --rounds 2 --repeats 1 --no-write

Both draw the same weights and inputs. The loop takes the unbiased variance of a pass of its own for
its batch norms, as variant "published" does: in float64 whole runs of that variant keep the weights
that the loop keeps, those of variant "paper" (biased variance) others. In float32 a difference in
the last digit decides near the threshold, later rounds rank what it left, and after 20 rounds most
of the 2 % are others; the counts of the layers differ by about 1 %.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import paikern as pk
from bench.options import count
from bench.references.ntk_sap import ntk_sap
from bench.run_dpai import agreement
from bench.timing import Row, compare, use_threads, write_results
from paikern import zoo

SPARSITY = 0.98
SEED = 0
THREADS = 2

#: name -> arguments of the zoo, samples
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet20": ({"num_classes": 10}, 100),
    "vgg16_bn": ({"num_classes": 10, "image_size": 32}, 100),
}


def compare_runs(name: str, rounds: int, repeats: int, variant: str) -> Row:
    """Time one network of `NETWORKS` and return its row of the results."""
    options, samples = NETWORKS[name]
    model = zoo.create(name, seed=SEED, **options)
    x = torch.ones(samples, 3, 32, 32)
    found: dict[str, dict[str, Tensor]] = {}

    def ours() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = pk.prune(
                model, "ntk_sap", sparsity=SPARSITY, data=x, rounds=rounds, variant=variant,
                apply=False, progress=False, seed=SEED,
            )  # fmt: skip
        found["ours"] = dict(masks)

    def reference() -> None:
        found["loop"] = ntk_sap(model, [x], SPARSITY, rounds, selection="exact", seed=SEED)

    times = compare(ours, reference, repeats=repeats, warmup=0)
    kept = [sum(int(mask.sum()) for mask in masks.values()) for masks in found.values()]
    if kept[0] != kept[1]:
        raise ValueError(f"run_ntk: the two sides keep {kept} weights")
    return {
        "method": "ntk_sap", "model": name, "sparsity": SPARSITY, "variant": variant, **times,
        "rounds": rounds, "samples": samples, "kept": kept[0],
        "mask_agreement": agreement(found["ours"], found["loop"]),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print it, write `bench/results/ntk_sap.json`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.run_ntk", description=__doc__)
    parser.add_argument("--nets", nargs="+", choices=NETWORKS, default=["resnet20"])
    parser.add_argument("--variants", nargs="+", choices=("paper", "published"), default=["paper"])
    parser.add_argument("--rounds", type=count, default=20)
    parser.add_argument("--repeats", type=count, default=3, help="timed runs of each contender")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--no-write", action="store_true", help="leave the results file alone")
    given = parser.parse_args(arguments)
    use_threads("bench.run_ntk", given.threads, arguments)
    rows = []
    for name in given.nets:
        for variant in given.variants:
            row = compare_runs(name, given.rounds, given.repeats, variant)
            print(
                f"{name}, {variant}, {given.rounds} rounds: paikern {row['seconds']:.2f} s, "
                f"loop {row['reference_seconds']:.2f} s, {row['ratio']:.2f}x, "
                f"same mask {row['mask_agreement']:.1%}"
            )
            rows.append(row)
    if not given.no_write:
        print(write_results("ntk_sap", rows, threads=given.threads, seeds=[SEED]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
