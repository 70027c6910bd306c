"""Train pruned networks three ways: dense, dense with masks attached, and in packed form.

    python -m bench.train_packed --out out

LeNet-300-100 and a ViT-style MLP (patches, four residual blocks of LayerNorm, 384 -> 1536 -> 384)
on 5,000 real MNIST images, pruned to 95 % before training. The three start from the same weights
and see the same batches; their epochs run in turn, and each gets the median of its epochs. Bytes
are those of weights, gradients, optimizer state, masks and positions after the last step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import paikern as pk
from bench import options
from bench.mnist import Split, load
from bench.timing import machine, use_threads, versions
from bench.train_demo import accuracy, append, check_zeros, markdown, plain_text, write
from paikern.masks import MaskSet

MODULE = "bench.train_packed"
SPARSITY = 0.95
BATCH = 100
SEEDS = (0, 1, 2)
WAYS = ("dense", "dense-masked", "packed")


class PatchMLP(nn.Module):
    """The MLP half of a ViT: patches, residual blocks of LayerNorm and two layers, mean, head."""

    def __init__(self, patch: int = 7, width: int = 384, hidden: int = 1536, depth: int = 4):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.positions = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        x = self.embed(patches) + self.positions
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class Network(NamedTuple):
    build: Callable[[], nn.Module]
    optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]
    epochs: int
    rows: int  # of x that a layer sees for a batch


NETWORKS = {
    "lenet300": Network(
        lambda: pk.zoo.create("lenet300"),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4),
        20,
        BATCH,
    ),
    "patch_mlp": Network(
        PatchMLP, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), 5, BATCH * 16
    ),
}


class Run:
    """One network trained one way."""

    def __init__(self, way: str, network: Network, start: nn.Module, masks: MaskSet) -> None:
        self.way, self.masks = way, masks
        self.model = copy.deepcopy(start)
        if way == "packed":
            pk.sparsify(self.model, masks, batch=network.rows, training=True)
        self.optimizer = network.optimizer(self.model.parameters())
        # In packed form, for the layers that are left dense.
        self.handle = None if way == "dense" else masks.attach(self.model, self.optimizer)
        self.seconds: list[float] = []

    def epoch(self, data: Split, order: Sequence[Tensor]) -> None:
        self.model.train()
        start = time.perf_counter()
        for index in order:
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(data.train_x[index]), data.train_y[index])
            loss.backward()
            self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)

    def nbytes(self) -> int:
        """Weights, biases, gradients, optimizer state, and masks or positions."""
        held = [t for p in self.model.parameters() for t in (p, p.grad) if t is not None]
        for state in self.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        total = sum(tensor.numel() * tensor.element_size() for tensor in held)
        for module in self.model.modules():
            if isinstance(module, pk.PackedWeight):
                total += module.nbytes - module.values.numel() * module.values.element_size()
        if self.handle is not None:  # the bits of the weights that are dense
            dense = dict(self.model.named_parameters())
            total += sum(self.masks.packed(name).numel() for name in self.masks if name in dense)
        return total

    def finish(self, data: Split) -> float:
        if self.way == "packed":
            self.model = pk.densify(self.model)
        if self.way != "dense":
            check_zeros(self.model, self.masks)
        return accuracy(self.model, data.test_x, data.test_y)


def train(name: str, seeds: Sequence[int], epochs: int | None, bar: tqdm[Any]) -> dict[str, Any]:
    """All ways and seeds of one network; returns its row of the results."""
    network = NETWORKS[name]
    data = load(28, 1)
    found: dict[str, dict[str, list[float]]] = {
        way: {"accuracies": [], "seconds": [], "bytes": []} for way in WAYS
    }
    sparsity, packed = 0.0, 0
    for seed in seeds:
        torch.manual_seed(seed)
        start = network.build()
        masks = pk.prune(
            start, "dpai", sparsity=SPARSITY, example_inputs=data.train_x[:1], apply=False
        )
        runs = [Run(way, network, start, masks) for way in WAYS]
        packed = sum(isinstance(m, pk.PackedWeight) for m in runs[-1].model.modules())
        sparsity = masks.sparsity
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs or network.epochs):
            order = torch.randperm(len(data.train_y), generator=generator).split(BATCH)
            for run in runs if len(runs[0].seconds) % 2 == 0 else reversed(runs):
                run.epoch(data, order)
            bar.update()
        for run in runs:
            found[run.way]["bytes"].append(run.nbytes())
            found[run.way]["seconds"] += run.seconds[1:] or run.seconds  # the first warms up
            found[run.way]["accuracies"].append(run.finish(data))
    return {
        "model": name,
        "sparsity": sparsity,
        "epochs": epochs or network.epochs,
        "packed_layers": packed,
        "prunable_layers": len(masks),
        "ways": {way: summary(values) for way, values in found.items()},
    }


def summary(values: dict[str, list[float]]) -> dict[str, Any]:
    accuracies = values["accuracies"]
    return {
        "accuracies": accuracies,
        "accuracy_mean": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "epoch_seconds": statistics.median(values["seconds"]),
        "bytes": max(values["bytes"]),
    }


def result_rows(trained: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a network: packed against dense with masks attached."""
    rows = []
    for one in trained:
        ours, reference = one["ways"]["packed"], one["ways"]["dense-masked"]
        rows.append(
            {
                "method": "packed training",
                **one,
                "seconds": ours["epoch_seconds"],
                "reference_seconds": reference["epoch_seconds"],
                "ratio": reference["epoch_seconds"] / ours["epoch_seconds"],
            }
        )
    return rows


def summary_table(trained: Sequence[dict[str, Any]], seeds: int) -> Table:
    """Time, memory and accuracy beside each other."""
    table = Table(title=f"Training at {SPARSITY:.0%} on 5,000 MNIST images, {seeds} seeds")
    for column in (
        "network",
        "trained",
        "accuracy %",
        "std",
        "seconds an epoch",
        "faster",
        "MB",
        "smaller",
    ):
        table.add_column(column, justify="left" if column in ("network", "trained") else "right")
    for one in trained:
        reference = one["ways"]["dense-masked"]
        for way, value in one["ways"].items():
            table.add_row(
                one["model"],
                way,
                f"{100 * value['accuracy_mean']:.2f}",
                f"{100 * value['accuracy_std']:.2f}",
                f"{value['epoch_seconds']:.3f}",
                f"{reference['epoch_seconds'] / value['epoch_seconds']:.2f}x",
                f"{value['bytes'] / 1e6:.2f}",
                f"{reference['bytes'] / value['bytes']:.1f}x",
            )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--epochs", type=options.count, help="instead of those of the network")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--threads", type=options.count, default=2)
    given = parser.parse_args(arguments)
    use_threads(MODULE, given.threads, arguments)
    total = sum(given.epochs or NETWORKS[n].epochs for n in given.networks) * len(given.seeds)
    trained = []
    try:
        with tqdm(total=total, unit="epoch", disable=None) as bar:
            for name in given.networks:
                bar.set_description(name)
                trained.append(train(name, given.seeds, given.epochs, bar))
    except FileNotFoundError as error:
        print(f"train_packed: {error}", file=sys.stderr)
        return 2
    table = summary_table(trained, len(given.seeds))
    Console(width=110).print(table)
    given.out.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": 1,
        "machine": machine(),
        "versions": versions(),
        "threads": given.threads,
        "seeds": given.seeds,
        "rows": result_rows(trained),
    }
    write(given.out / "train_packed.json", json.dumps(content, indent=2) + "\n")
    append(given.out / "summary.txt", plain_text(table), heading="Training in packed form")
    append(given.out / "summary.md", markdown(table), heading="## Training in packed form")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
