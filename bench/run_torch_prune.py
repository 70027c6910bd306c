"""paikern.torch_prune against torch.nn.utils.prune: the time of a call, and the memory it takes.

    python -m bench.run_torch_prune                       1e8 weights in 200 layers, 2 threads
    python -m bench.run_torch_prune --weights 1e7 --repeats 5 --threads 1 --no-write

Both prune the same weights in turn; each call starts from the same state. Memory is the peak of a
process of its own, above what it held before the call, in multiples of the weights.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.timing import Row, interleave, use_threads, write_results

LIBRARIES = {"ours": "paikern.torch_prune", "reference": "torch.nn.utils.prune"}
LAYERS = 200
SPARSITY = 0.8
SEED = 0

Action = Callable[[ModuleType, nn.ModuleList], object]


def network(weights: float, layers: int = LAYERS) -> nn.ModuleList:
    """Linear layers and 3x3 convolutions in turn, about `weights` weights in all."""
    torch.manual_seed(SEED)
    each = weights / layers
    features, channels = max(1, round(each**0.5)), max(1, round((each / 9) ** 0.5))
    net = nn.ModuleList()
    for index in range(layers):
        if index % 2:
            net.append(nn.Conv2d(channels, channels, 3, bias=False))
        else:
            net.append(nn.Linear(features, features, bias=False))
    return net


def prune_globally(library: ModuleType, net: nn.ModuleList) -> None:
    """One call over all layers."""
    pairs = [(layer, "weight") for layer in net]
    library.global_unstructured(pairs, pruning_method=library.L1Unstructured, amount=SPARSITY)


def prune_globally_again(library: ModuleType, net: nn.ModuleList) -> None:
    """One more call, on what is left: half of it goes."""
    pairs = [(layer, "weight") for layer in net]
    library.global_unstructured(pairs, pruning_method=library.L1Unstructured, amount=0.5)


def prune_by_layer(library: ModuleType, net: nn.ModuleList) -> None:
    """A call for each layer."""
    for layer in net:
        library.l1_unstructured(layer, "weight", amount=SPARSITY)


def make_dense(net: nn.ModuleList) -> None:
    """Take all pruning off and give the original weights back."""
    for layer in net:
        if "weight_orig" in layer._parameters:
            original = layer._parameters.pop("weight_orig")
            layer._forward_pre_hooks.clear()
            layer.__dict__["_buffers"] = {}
            layer.__dict__.pop("weight", None)
            layer.register_parameter("weight", original)


def nothing(library: ModuleType, net: nn.ModuleList) -> None:
    """Leave the network dense."""


#: name -> what is done before, what is timed, the sparsity reached
ACTIONS: dict[str, tuple[Action, Action, float]] = {
    "global_unstructured": (nothing, prune_globally, SPARSITY),
    "global_unstructured, again": (prune_globally, prune_globally_again, 1 - (1 - SPARSITY) / 2),
    "l1_unstructured, every layer": (nothing, prune_by_layer, SPARSITY),
}


def timed(name: str, net: nn.ModuleList, repeats: int) -> Row:
    """Time both libraries on one network; the agreement of their masks is a column."""
    before, action, _ = ACTIONS[name]
    samples: dict[str, list[float]] = {key: [] for key in LIBRARIES}
    masks: dict[str, list[torch.Tensor]] = {}
    for index in range(-1, repeats):  # the first round is not counted
        for key in LIBRARIES if index % 2 else reversed(LIBRARIES):
            library = importlib.import_module(LIBRARIES[key])
            make_dense(net)
            before(library, net)

            def call(library: ModuleType = library) -> object:
                return action(library, net)

            seconds = interleave({key: call}, repeats=1, warmup=0)[key]
            if index >= 0:
                samples[key] += seconds
            if index == repeats - 1:
                masks[key] = [layer.weight_mask != 0 for layer in net]
    kept = sum(int(mask.sum()) for mask in masks["reference"])
    both = sum(int((a & b).sum()) for a, b in zip(*masks.values(), strict=True))
    make_dense(net)
    medians = {key: statistics.median(times) for key, times in samples.items()}
    return {
        "seconds": medians["ours"],
        "reference_seconds": medians["reference"],
        "ratio": medians["reference"] / medians["ours"],
        "repeats": repeats,
        "mask_agreement": both / kept,
    }


def status_bytes(field: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS is what the process holds, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"status_bytes: /proc/self/status has no line {field}")


def peak_memory(name: str, key: str, weights: float) -> float:
    """Peak of one call above what was held before, in multiples of the weights. Linux only."""
    library = importlib.import_module(LIBRARIES[key])
    before, action, _ = ACTIONS[name]
    for call in (before, action):  # what is loaded at the first call is not of this one
        call(library, network(1e4, 4))
    net = network(weights)
    before(library, net)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    held = status_bytes("VmRSS")
    action(library, net)
    numel = sum(layer.weight_orig.numel() for layer in net)
    return (status_bytes("VmHWM") - held) / (4 * numel)


def peak_in_a_process(name: str, key: str, weights: float, threads: int) -> float:
    """`peak_memory` in a process of its own."""
    command = [sys.executable, "-m", "bench.run_torch_prune", "--memory", name, key]
    command += ["--weights", str(weights), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table, write `bench/results/torch_prune.json`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.run_torch_prune", description=__doc__)
    parser.add_argument("--weights", type=float, default=1e8, help="about as many in all")
    parser.add_argument("--only", choices=ACTIONS, help="one call instead of all")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each library")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--no-write", action="store_true", help="leave the results file alone")
    given = parser.parse_args(arguments)
    use_threads("bench.run_torch_prune", given.threads, arguments)
    if given.memory:
        print(json.dumps(peak_memory(*given.memory, given.weights)))
        return 0

    net = network(given.weights)
    numel = sum(layer.weight.numel() for layer in net)
    rows: list[Row] = []
    for name in [given.only] if given.only else ACTIONS:
        memory = {
            key: peak_in_a_process(name, key, given.weights, given.threads) for key in LIBRARIES
        }
        rows.append(
            {
                "method": name,
                "model": f"{len(net)} layers, {numel} weights",
                "sparsity": ACTIONS[name][2],
                **timed(name, net, given.repeats),
                "extra_memory": memory["ours"],
                "reference_extra_memory": memory["reference"],
            }
        )
    table = Table(title=f"{numel:,} weights in {len(net)} layers, {given.threads} threads")
    for column in ("call", "paikern ms", "PyTorch ms", "ratio", "memory", "PyTorch", "same mask"):
        table.add_column(column, justify="left" if column == "call" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['reference_seconds']:.1f}",
            f"{row['ratio']:.1f}x",
            f"{row['extra_memory']:.3f}x",
            f"{row['reference_extra_memory']:.2f}x",
            f"{row['mask_agreement']:.5%}",
        )
    Console().print(table)
    if not given.no_write:
        print(write_results("torch_prune", rows, threads=given.threads, seeds=[SEED]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
