"""One DPaI step of paikern against the same step in plain PyTorch, interleaved.

    python -m bench.run_dpai                      all networks at 98 %, 2 threads
    python -m bench.run_dpai --only resnet20 --repeats 5 --no-write

Both start from the same scores and take the same number of steps, so their masks can be compared
at the end: the agreement is a column of the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.references.dpai import DPaIReference
from bench.timing import Row, compare, use_threads, write_results
from paikern import zoo

SPARSITY = 0.98
SEED = 0
THREADS = 2

#: name -> arguments of the zoo, timed steps
NETWORKS = {
    "resnet20": ({"num_classes": 10}, 30),
    "vgg19_bn": ({"num_classes": 100}, 7),
    "resnet50": ({"num_classes": 1000}, 5),
}


class LibrarySteps(NamedTuple):
    """paikern's side: `step()` does one step, `masks()` gives the bool masks of the scores.

    `train(n)` does n of them as a run does, with no more said in between than a run says.
    """

    step: Callable[[], object]
    masks: Callable[[], dict[str, Tensor]]
    train: Callable[[int], object]


def library_steps(
    model: nn.Module,
    example: Tensor,
    scores: dict[str, Tensor],
    kept: list[int],
    variant: str,
    **options: object,
) -> LibrarySteps:
    """Set up paikern's DPaI on given scores and budgets: the one place that knows its classes."""
    from paikern import ops
    from paikern.prunable import prunable_parameters
    from paikern.scorers.base import Run, make_scorer
    from paikern.scorers.dpai import DPaI, DPaITrainer

    state = dict(model.named_parameters()) | dict(model.named_buffers())
    state = {name: tensor.detach() for name, tensor in state.items()}
    run = Run(model, state, prunable_parameters(model), example, SEED, variant)
    settings = make_scorer("dpai", {"init_scores": scores, **options})
    assert isinstance(settings, DPaI)
    trainer = DPaITrainer(run, settings.resolved(variant), kept)

    def masks() -> dict[str, Tensor]:
        trainer.select()
        shapes = {name: score.shape for name, score in scores.items()}
        return {
            name: ops.unpack_mask(bits, list(shapes[name])) for name, bits in trainer.masks.items()
        }

    return LibrarySteps(trainer.step, masks, lambda steps: list(trainer.train(steps)))


def agreement(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the share of kept weights that both masks keep."""
    both = sum(int((mask & right[name]).sum()) for name, mask in left.items())
    return both / sum(int(mask.sum()) for mask in left.values())


def compare_steps(name: str, *, variant: str = "published", repeats: int | None = None) -> Row:
    """Time one network of `NETWORKS` and return its row of the results."""
    options, default_repeats = NETWORKS[name]
    model = zoo.create(name, seed=SEED, **options)
    example = zoo.example_input(model)
    reference = DPaIReference(model, example, SPARSITY, variant=variant, seed=SEED)
    kept = [layer.keep for layer in reference.layers]
    library = library_steps(model, example, reference.scores(), kept, variant)
    times = compare(library.step, reference.step, repeats=repeats or default_repeats, warmup=2)
    return {
        "method": "dpai",
        "model": name,
        "sparsity": SPARSITY,
        "variant": variant,
        **times,
        "steps": reference.steps_done,
        "mask_agreement": agreement(reference.masks(), library.masks()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table, write `bench/results/dpai_step.json`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.run_dpai", description=__doc__)
    parser.add_argument("--only", choices=NETWORKS, help="one network instead of all")
    parser.add_argument("--variant", choices=("published", "paper"), default="published")
    parser.add_argument("--repeats", type=int, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--no-write", action="store_true", help="leave the results file alone")
    given = parser.parse_args(arguments)
    use_threads("bench.run_dpai", given.threads, arguments)

    rows = [
        compare_steps(name, variant=given.variant, repeats=given.repeats)
        for name in ([given.only] if given.only else NETWORKS)
    ]
    table = Table(title=f"One DPaI step at {SPARSITY:.0%}, {torch.get_num_threads()} threads")
    for column in ("network", "paikern ms", "PyTorch ms", "ratio", "same mask"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{1e3 * row['seconds']:.2f}",
            f"{1e3 * row['reference_seconds']:.2f}",
            f"{row['ratio']:.1f}x",
            f"{row['mask_agreement']:.4%}",
        )
    Console().print(table)
    if not given.no_write:
        print(write_results("dpai_step", rows, threads=given.threads, seeds=[SEED]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
