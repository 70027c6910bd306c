"""Train the pruned networks and the dense one on 5,000 real MNIST images; masks stay attached.

    python -m bench.train_demo --out out

Reads the masks that `make prune` left in `out/` (dpai, synflow, magnitude, random), trains
ResNet-20 from fresh weights for every mask and seed, and adds mean and standard deviation of the
accuracy to `out/`. Images are scaled to 16 px, a quarter of the work of 32 px: masks do not depend
on the image size. Pruned weights are checked to be exactly 0 after the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from bench.mnist import Split, load
from bench.timing import machine, versions
from paikern import zoo
from paikern.masks import MaskSet, load_masks

MODEL = "resnet20"
METHODS = ("dpai", "synflow", "magnitude", "random")
SEEDS = (0, 1, 2)
IMAGE_SIZE = 16
BATCH = 100
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4


def find_masks(folder: Path, methods: Sequence[str]) -> dict[str, MaskSet]:
    """Return method -> masks of `folder`, whose files are `*method*.safetensors`."""
    found: dict[str, MaskSet] = {}
    for method in methods:
        files = sorted(folder.rglob(f"*{method}*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"{folder}: expected one mask file for {method}, found {len(files)}; "
                "run `make prune` first"
            )
        found[method] = load_masks(files[0])
    return found


def channels_last(data: Split) -> Split:
    """Return the split with its images in channels-last layout."""
    layout = torch.channels_last
    return data._replace(
        train_x=data.train_x.contiguous(memory_format=layout),
        test_x=data.test_x.contiguous(memory_format=layout),
    )


def train(
    masks: MaskSet | None, data: Split, *, channels: int, epochs: int, seed: int, bar: tqdm[Any]
) -> float:
    """Train one network from weights of `seed`; return its accuracy on the test images."""
    model = zoo.create(MODEL, seed=seed, num_classes=10, in_channels=channels)
    # 74 ms a step against 95 ms in the default layout (one thread of a Zen 5 core, torch 2.13).
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    handle = None if masks is None else masks.attach(model, optimizer)
    batches = len(data.train_y) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * batches
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_x[index]), data.train_y[index])
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.update()
    if masks is not None:
        check_zeros(model, masks)
    if handle is not None:
        handle.remove()
    return accuracy(model, data.test_x, data.test_y)


def check_zeros(model: nn.Module, masks: MaskSet) -> None:
    """Raise `RuntimeError` naming the first layer in which a pruned weight is not exactly 0."""
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        revived = int((weights[name].detach()[~mask] != 0).sum())
        if revived:
            raise RuntimeError(f"train_demo: {revived} pruned weights of {name} came back")


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of correct labels in eval mode."""
    model.eval()
    correct = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(x.split(500), y.split(500), strict=True)
    )
    return correct / len(y)


def summary_table(rows: Sequence[dict[str, Any]], epochs: int) -> Table:
    """Return the table that is printed and appended to the summary."""
    table = Table(
        title=f"{MODEL} on 5,000 MNIST images at {IMAGE_SIZE} px, {epochs} epochs, "
        f"{len(rows[0]['accuracies'])} seeds"
    )
    for column in ("method", "sparsity %", "accuracy %", "std", "seconds a run"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{100 * row['sparsity']:.2f}",
            f"{100 * row['accuracy_mean']:.2f}",
            f"{100 * row['accuracy_std']:.2f}",
            f"{row['seconds']:.1f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Train everything, print the table, write `train_demo.json`, append to `summary.txt`."""
    parser = argparse.ArgumentParser(prog="python -m bench.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    given = parser.parse_args(arguments)
    try:
        masks = find_masks(given.out, given.methods)
        channels = {m.shapes["conv1.weight"][1] for m in masks.values()}
        if len(channels) != 1:
            raise ValueError(f"masks in {given.out} are of networks with {channels} input channels")
        data = channels_last(load(IMAGE_SIZE, channels.pop()))
    except (FileNotFoundError, ValueError) as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 2

    runs: dict[str, MaskSet | None] = {"dense": None, **masks}
    rows: list[dict[str, Any]] = []
    total = len(runs) * len(given.seeds) * given.epochs
    with tqdm(total=total, unit="epoch", disable=None) as bar:
        for method, mask_set in runs.items():
            bar.set_description(method)
            start = time.perf_counter()
            accuracies = [
                train(
                    mask_set,
                    data,
                    channels=data.train_x.shape[1],
                    epochs=given.epochs,
                    seed=seed,
                    bar=bar,
                )
                for seed in given.seeds
            ]
            rows.append(
                {
                    "method": method,
                    "model": MODEL,
                    "sparsity": 0.0 if mask_set is None else mask_set.sparsity,
                    "accuracies": accuracies,
                    "accuracy_mean": statistics.mean(accuracies),
                    "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                    "seconds": (time.perf_counter() - start) / len(given.seeds),
                }
            )

    table = summary_table(rows, given.epochs)
    Console().print(table)
    content = {
        "schema": 1,
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seeds": given.seeds,
        "epochs": given.epochs,
        "image_size": IMAGE_SIZE,
        "rows": rows,
    }
    write(given.out / "train_demo.json", json.dumps(content, indent=2) + "\n")
    append(given.out / "summary.txt", plain_text(table), heading="Training")
    append(given.out / "summary.md", markdown(table), heading="## Training")
    return 0


def plain_text(table: Table) -> str:
    """Return the table as it looks on a terminal, without colours."""
    with open(os.devnull, "w") as nowhere:
        console = Console(width=100, record=True, file=nowhere)
        console.print(table)
        return console.export_text()


def markdown(table: Table) -> str:
    """Return the table in Markdown, numbers to the right."""
    columns = [list(column.cells) for column in table.columns]
    header = " | ".join(str(column.header) for column in table.columns)
    rule = " | ".join("---:" if c.justify == "right" else "---" for c in table.columns)
    body = [" | ".join(map(str, cells)) for cells in zip(*columns, strict=True)]
    lines = [f"| {line} |" for line in (header, rule, *body)]
    return "\n".join([str(table.title), "", *lines, ""])


def append(path: Path, text: str, *, heading: str) -> None:
    """Append a part to the summary, in place of the one that an earlier training left."""
    before = path.read_text().partition(f"\n{heading}\n")[0] if path.exists() else ""
    write(path, f"{before}\n{heading}\n\n{text}")


def write(path: Path, text: str) -> None:
    """Write `path` as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    raise SystemExit(main())
