"""`global_unstructured` over 100 million weights in 200 layers: paikern.torch_prune against torch.

    python -m bench.selection_prune                          both, three times each, in turn
    python -m bench.selection_prune paikern.torch_prune      one of them, here

Each run is a process of its own, as pruning changes the modules and peak memory is measured too.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.selection_memory import peak_beyond
from bench.timing import Row

ROOT = Path(__file__).parents[1]
OURS, TORCH = "paikern.torch_prune", "torch.nn.utils.prune"
LAYERS, ROWS, COLUMNS = 200, 500, 1000
AMOUNT = 0.9
RUNS = 3


def available() -> bool:
    """Whether this paikern has `torch_prune`."""
    return importlib.util.find_spec(OURS) is not None


def run_here(name: str) -> dict[str, Any]:
    """Prune once in this process: seconds, peak memory beyond the weights, weights kept."""
    prune = importlib.import_module(name)
    torch.manual_seed(0)
    small = nn.Linear(8, 8)  # what the first call loads is not the pruning's
    prune.global_unstructured([(small, "weight")], prune.L1Unstructured, amount=0.5)
    layers = [nn.Linear(COLUMNS, ROWS, bias=False) for _ in range(LAYERS)]
    parameters = [(layer, "weight") for layer in layers]
    seconds = 0.0

    def act() -> None:
        nonlocal seconds
        start = time.perf_counter()
        prune.global_unstructured(parameters, prune.L1Unstructured, amount=AMOUNT)
        seconds = time.perf_counter() - start

    extra = peak_beyond(act)
    kept = sum(int(torch.count_nonzero(layer.get_buffer("weight_mask"))) for layer in layers)
    return {"seconds": seconds, "extra_bytes": extra, "kept": kept}


def compare(threads: int) -> Row:
    """Run both in turn, in processes of their own, and return the row of the results."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    found: dict[str, list[dict[str, Any]]] = {OURS: [], TORCH: []}
    for _ in range(RUNS):
        for name, runs in found.items():
            done = subprocess.run(
                [sys.executable, "-m", "bench.selection_prune", name],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise RuntimeError(f"bench.selection_prune {name} failed:\n{done.stderr}")
            runs.append(json.loads(done.stdout))
    seconds, reference = (statistics.median(r["seconds"] for r in found[n]) for n in found)
    weight_bytes = 4 * LAYERS * ROWS * COLUMNS
    return {
        "op": "global_unstructured",
        "size": LAYERS * ROWS * COLUMNS,
        "distribution": f"{LAYERS} layers, uniform",
        "keep": 1.0 - AMOUNT,
        "sparsity": AMOUNT,
        "threads": threads,
        "dtype": "float32",
        "layout": "modules",
        "reference": TORCH,
        "seconds": seconds,
        "reference_seconds": reference,
        "ratio": reference / seconds,
        "samples": RUNS,
        "reference_samples": RUNS,
        "extra_memory": max(r["extra_bytes"] for r in found[OURS]) / weight_bytes,
        "reference_extra_memory": max(r["extra_bytes"] for r in found[TORCH]) / weight_bytes,
        "kept": found[OURS][0]["kept"],
        "reference_kept": found[TORCH][0]["kept"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one run of the module that is named, or the comparison."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in (OURS, TORCH):
        print(f"unknown module {given[0]!r}; one of {OURS}, {TORCH}", file=sys.stderr)
        return 2
    print(json.dumps(run_here(given[0]) if given else compare(torch.get_num_threads())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
