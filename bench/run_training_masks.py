"""What ASNI does at the end of an epoch, on a ResNet-50: threshold, masks, zeros.

    python -m bench.run_training_masks                      1 and 2 threads, a minute
    python -m bench.run_training_masks --threads 1 --epochs 45 90 --no-write

Three pairs are timed in turn, at several epochs of the schedule with the values of the paper:

    masks     the selection of the pruner, threshold and bits of the k largest survivors of all
              layers, against concatenation, torch.kthvalue and comparison
    kthvalue  the same against torch.kthvalue alone: one number, of magnitudes that lie ready
    epoch     pruner.on_epoch_end with an SGD: check for NaN, selection, zeros in the weights and in
              their momentum; against concatenation, kthvalue, comparison and two products

The weights between two epochs are what the last one has left, moved a little where it kept them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import paikern as pk
from bench.options import count
from bench.references import asni as reference
from bench.timing import Row, interleave, use_threads, write_results
from paikern import ops
from paikern.training.survivors import keep_largest

MODEL = "resnet50"
ALPHA, BETA, GAMMA, EPOCHS = 81.04, 0.5, 10.0, 90
TIMED = (5, 45, 90)
THREADS = (1, 2)
REPEATS = 5
MOVE = 0.01  # of the standard deviation of a layer, between two epochs
TARGET = 30.0
SEED = 0
PAGE = Path(__file__).with_name("training_masks.md")


def network() -> nn.Module:
    model = pk.zoo.create(MODEL, seed=SEED)
    for parameter in model.parameters():  # whoever steps finds a gradient
        parameter.grad = torch.zeros_like(parameter)
    return model


def weights_of(model: nn.Module, pruner: pk.training.Pruner) -> list[Tensor]:
    held = dict(model.named_parameters())
    return [held[name].detach() for name in pruner.masks]


def moved(model: nn.Module, pruner: pk.training.Pruner, generator: torch.Generator) -> None:
    """An epoch of training, as far as selection can tell."""
    held = dict(model.named_parameters())
    for name, mask in pruner.masks.items():
        weight = held[name].detach()
        step = torch.randn(weight.shape, generator=generator) * (MOVE * float(weight.std()))
        weight.add_(step.mul_(mask))


def run(epochs: Sequence[int], repeats: int) -> Iterator[Row]:
    """Walk along the schedule and time the asked epochs."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    optimizer.step()
    pruner = pk.pruner(
        "asni", model, alpha=ALPHA, beta=BETA, gamma=GAMMA, epochs=EPOCHS, optimizer=optimizer
    )
    assert isinstance(pruner, pk.training.ASNI)
    generator = torch.Generator().manual_seed(SEED)
    for epoch in range(1, max(epochs) + 1):
        if epoch not in epochs and epoch + 1 not in epochs:
            pruner.epoch = epoch  # nothing of it is timed, nor the last before it
            continue
        moved(model, pruner, generator)
        if epoch in epochs:
            kept = pruner.kept_at(epoch)
            before = [w.clone() for w in weights_of(model, pruner)]
            yield from timed(model, pruner, before, kept, epoch, repeats)
        pruner.on_epoch_end(model)


def put_back(weights: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def timed(
    model: nn.Module,
    pruner: pk.training.ASNI,
    before: Sequence[Tensor],
    kept: int,
    epoch: int,
    repeats: int,
) -> Iterator[Row]:
    weights = weights_of(model, pruner)
    named = dict(zip(pruner.masks, weights, strict=True))
    removed = pruner.total - kept
    flat = reference.magnitudes(weights)
    [optimizer] = pruner.settings.optimizers
    held = dict(model.named_parameters())
    momenta = [optimizer.state[held[name]]["momentum_buffer"] for name in pruner.masks]
    state = pruner.state_dict()

    def masks() -> dict[str, Tensor]:
        return keep_largest(named, pruner.masks, kept, on_collapse="warn", when="now")

    def epoch_end() -> object:
        return pruner.on_epoch_end(model)

    def reference_epoch_end() -> None:
        for momentum, mask in zip(momenta, reference.epoch_end(weights, removed), strict=True):
            momentum.mul_(mask)

    def nothing() -> None:
        pass

    def again() -> None:
        put_back(weights, before)
        pruner.load_state_dict(state)

    row = {
        "method": "asni",
        "model": MODEL,
        "weights": pruner.total,
        "sparsity": removed / pruner.total,
        "epoch": epoch,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    chosen = smallest(masks(), named)
    if chosen != (tau := float(reference.threshold(flat, removed))):
        raise AssertionError(f"epoch {epoch}: kept down to {chosen}, kthvalue says {tau}")
    for what, ours, theirs, between in (
        ("masks", masks, lambda: reference.masks(weights, removed), nothing),
        ("kthvalue", masks, lambda: reference.threshold(flat, removed), nothing),
        ("epoch", epoch_end, reference_epoch_end, again),
    ):
        pair = {"ours": ours, "reference": theirs}
        yield {**row, "what": what, **seconds(pair, repeats, between)}
    again()


def smallest(packed: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    """The smallest |w| that a selection keeps."""
    found = []
    for name, weight in weights.items():
        kept = ops.unpack_mask(packed[name], tuple(weight.shape))
        if bool(kept.any()):
            found.append(float(weight.abs()[kept].min()))
    return min(found)


def seconds(
    pair: dict[str, Callable[[], object]], repeats: int, between: Callable[[], None]
) -> dict[str, float]:
    """Medians of both; `between` puts back what a call has changed, outside the clock."""
    samples: dict[str, list[float]] = {name: [] for name in pair}
    for index in range(-1, repeats):
        for name in pair if index % 2 else reversed(pair):
            between()
            measured = interleave({name: pair[name]}, repeats=1, warmup=0)[name]
            if index >= 0:
                samples[name] += measured
    ours, theirs = (statistics.median(samples[name]) for name in ("ours", "reference"))
    return {"seconds": ours, "reference_seconds": theirs, "ratio": theirs / ours}


TITLES = {
    "masks": "Threshold and masks",
    "kthvalue": "Threshold and masks against `torch.kthvalue` alone",
    "epoch": "The whole end of an epoch",
}


def report(rows: Sequence[Row]) -> str:
    lines = [
        "# Masks during training, measured",
        "",
        "Written by `python -m bench.run_training_masks` from",
        "[training_masks.json](results/training_masks.json), which names machine and versions. The",
        f"schedule is ASNI's for a ResNet-50 (alpha {ALPHA}, gamma {GAMMA:g}, {EPOCHS} epochs).",
        "What is timed stands at the head of the program; a ratio is plain PyTorch's time over",
        "paikern's.",
    ]
    for what, title in TITLES.items():
        chosen = [row for row in rows if row["what"] == what]
        if not chosen:
            continue
        lines += [
            "",
            f"## {title}",
            "",
            "| epoch | sparsity | threads | paikern | PyTorch | ratio |",
        ]
        lines += ["|---:|---:|---:|---:|---:|---:|"]
        for row in chosen:
            lines.append(
                f"| {row['epoch']} | {row['sparsity']:.2%} | {row['threads']} "
                f"| {row['seconds'] * 1e3:.1f} ms | {row['reference_seconds'] * 1e3:.0f} ms "
                f"| {row['ratio']:.1f}x |"
            )
        if what in ("masks", "kthvalue"):
            worst = min(row["ratio"] for row in chosen)
            verdict = "met" if worst >= TARGET else "**missed**"
            lines += ["", f"Asked for: {TARGET:g}x at every epoch; worst {worst:.1f}x: {verdict}."]
        if what == "kthvalue":
            lines += [
                "",
                "Where most weights are 0, `kthvalue` has little left to order, while every weight",
                "is still read once.",
            ]
    return "\n".join(lines) + "\n"


def show(rows: Sequence[Row]) -> None:
    table = Table(title=f"ASNI on {MODEL}")
    for name in ("what", "epoch", "threads", "paikern ms", "PyTorch ms", "ratio"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(
            row["what"],
            str(row["epoch"]),
            str(row["threads"]),
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['reference_seconds'] * 1e3:.1f}",
            f"{row['ratio']:.1f}",
        )
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run_training_masks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", nargs="+", type=count, default=list(THREADS))
    parser.add_argument("--epochs", nargs="+", type=count, default=list(TIMED))
    parser.add_argument("--repeats", type=count, default=REPEATS)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(arguments)
    use_threads("bench.run_training_masks", max(given.threads), arguments)
    rows: list[Row] = []
    for threads in sorted(given.threads):
        torch.set_num_threads(threads)
        rows += run(sorted(given.epochs), given.repeats)
    show(rows)
    if not given.no_write:
        path = write_results("training_masks", rows, threads=max(given.threads), seeds=[SEED])
        PAGE.write_text(report(rows))
        print(path, PAGE, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
