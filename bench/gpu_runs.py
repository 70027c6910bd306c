"""Whole methods on a GPU: rounds of SynFlow, steps of DPaI, against plain PyTorch on the same GPU.

The loops are those of bench/references, on a model and an input that lie on the GPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.gpu_clock import Clock
from bench.references.dpai import DPaIReference
from bench.references.synflow import synflow
from bench.run_dpai import agreement, library_steps
from bench.timing import Row

SEED = 0
SPARSITY = 0.9
DPAI_SPARSITY = 0.98


class Effort(NamedTuple):
    """The network, and how long methods go on."""

    model: str = "resnet50"
    classes: int = 1000
    rounds: int = 100
    steps: int = 50
    reference_steps: int = 10
    width: int = 4096
    inner: int = 11008
    blocks: int = 32
    round_pair: tuple[int, int] = (2, 12)


def _network(effort: Effort, device: torch.device) -> tuple[nn.Module, Tensor]:
    from paikern import zoo

    model = zoo.create(effort.model, num_classes=effort.classes, seed=SEED).eval()
    return model.to(device), zoo.example_input(model).to(device)


def _pruned(model: nn.Module, x: Tensor, rounds: int, variant: str) -> Mapping[str, Tensor]:
    import paikern as pk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pk.prune(
            model, "synflow", sparsity=SPARSITY, rounds=rounds, example_inputs=x, apply=False,
            variant=variant,
        )  # fmt: skip


def synflow_run(clock: Clock, effort: Effort, bandwidth: float) -> Iterator[Row]:
    """SynFlow from the model to the masks; the reference in float64, as float32 overflows."""
    model, x = _network(effort, clock.device)
    weights = sum(_weights(model))
    masks: dict[str, Mapping[str, Tensor]] = {}

    def ours() -> None:
        masks["ours"] = _pruned(model, x, effort.rounds, "published")

    def plain() -> None:
        masks["reference"] = synflow(model, x, SPARSITY, effort.rounds, dtype=torch.float64)

    _pruned(model, x, 1, "published")  # compiles what is compiled when first used
    seconds = clock.whole(ours, 3)
    reference = clock.whole(plain)
    floor = effort.rounds * (2 * 4 * weights + weights / 8) / bandwidth
    agreed = agreement(_here(masks["ours"]), _here(masks["reference"]))
    few = max(1, effort.rounds // 5)
    short = clock.whole(lambda: _pruned(model, x, few, "published"), 3)
    a_round = _each(seconds, effort.rounds, short, few)
    for rounds, ours_took in ((effort.rounds, seconds), (1, a_round)):
        share = rounds / effort.rounds
        yield {
            "op": "path",
            "method": "synflow",
            "model": f"{effort.model}, {'a round' if rounds == 1 else f'{rounds} rounds'}",
            "rounds": rounds,
            "sparsity": SPARSITY,
            "floor_seconds": floor * share,
            "seconds": ours_took,
            "reference": "torch, float64",
            "reference_seconds": reference * share,
            "ratio": reference * share / ours_took,
            "bandwidth_fraction": floor * share / ours_took,
            "mask_agreement": agreed,
        }


def _each(long: float, many: int, short: float, few: int) -> float:
    """What one more round takes; where runs are too short to tell, its share of the whole run."""
    more = (long - short) / (many - few)
    return more if more > 0.05 * long / many else long / many


def dpai_steps(clock: Clock, effort: Effort, bandwidth: float) -> Iterator[Row]:
    """One step of DPaI, of so many in a run, from the same scores on both sides."""
    model, x = _network(effort, clock.device)
    reference = DPaIReference(model, x, DPAI_SPARSITY, seed=SEED)
    kept = [layer.keep for layer in reference.layers]
    scores = {name: s.to(clock.device) for name, s in reference.scores().items()}
    # As the paper has it, by powers of two and with Adam: what a card replays from a graph. The
    # reference divides by maxima, which leaves the gradient of log R as it is but for rounding.
    library = library_steps(model, x, scores, kept, "paper", optimizer="adam")
    warm = 2
    library.train(warm)
    for _ in range(warm):
        reference.step()
    same = min(effort.steps, effort.reference_steps)
    seconds = clock.whole(lambda: library.train(same)) / same
    plain = clock.whole(lambda: [reference.step() for _ in range(same)]) / same
    agreed = agreement(_here(reference.masks()), _here(library.masks()))
    if effort.steps > same:  # the longer, the less its beginning counts
        more = effort.steps - same
        seconds = clock.whole(lambda: library.train(more)) / more
    # Scores and two moments, read and written; scores once more for the mask, and its bits.
    floor = sum(_weights(model)) * (6 * 4 + 4 + 1 / 8) / bandwidth
    yield {
        "op": "path",
        "method": "dpai",
        "model": effort.model,
        "steps": effort.steps,
        "sparsity": DPAI_SPARSITY,
        "floor_seconds": floor,
        "seconds": seconds,
        "reference": "torch",
        "reference_seconds": plain,
        "ratio": plain / seconds,
        "bandwidth_fraction": floor / seconds,
        "mask_agreement": agreed,
    }


def _here(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.cpu() for name, mask in masks.items()}


def _weights(model: nn.Module) -> list[int]:
    from paikern.prunable import prunable_parameters

    return [math.prod(p.shape) for p in prunable_parameters(model).values()]


class Block(nn.Module):
    """The linear layers of one block of a language model, joined as its paths are."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o(self.q(x) + self.k(x) + self.v(x))
        return x + self.down(self.gate(x) + self.up(x))


def language_model(effort: Effort, device: torch.device) -> nn.Module:
    """Of bfloat16 weights, N(0, 0.02), made where they stay."""
    with torch.device("meta"):
        model = nn.Sequential(*(Block(effort.width, effort.inner) for _ in range(effort.blocks)))
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02, generator=generator)
    return model.eval()


def synflow_round(clock: Clock, effort: Effort, bandwidth: float) -> Iterator[Row]:
    """One round of SynFlow on the layers of a 7B model: what more rounds take, by their number.

    The reference is two reads of the weights and one write of the bits at the speed of a copy.
    """
    model = language_model(effort, clock.device)
    x = torch.ones(1, effort.width, dtype=torch.bfloat16, device=clock.device)
    few, many = effort.round_pair
    taken: dict[int, float] = {}
    for rounds in (1, few, many):
        run: Callable[[], object] = lambda n=rounds: _pruned(model, x, n, "paper")  # noqa: E731
        taken[rounds] = clock.whole(run, 1 if rounds == 1 else 2)
    seconds = _each(taken[many], many, taken[few], few)
    weights = sum(_weights(model))
    floor = (2 * 2 * weights + weights / 8) / bandwidth
    yield {
        "op": "path",
        "method": "synflow",
        "model": f"7B stack, bfloat16, {weights:,} weights",
        "rounds": 1,
        "sparsity": SPARSITY,
        "floor_seconds": floor,
        "seconds": seconds,
        "reference": "two reads",
        "reference_seconds": floor,
        "ratio": floor / seconds,
        "bandwidth_fraction": floor / seconds,
    }
