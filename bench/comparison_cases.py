"""What the comparison runs: DPaI, NPB, PHEW and SynFlow, of paikern and as plain PyTorch loops.

A contender is one whole pruning run as a user starts it, tracing and budgets included, on a model
that is already in memory. The references are those of `bench/references`, written from the papers
and as costly as what people run today; nothing is taken from anyone's repository.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

OURS, REFERENCE = "paikern", "reference"
WHO = (OURS, REFERENCE)
METHODS = ("dpai", "npb", "phew", "synflow")
SEED = 0

#: name in the table -> (name in the zoo, its arguments)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "lenet300": ("lenet300", {}),
    "resnet20": ("resnet20", {"num_classes": 10}),
    "vgg19_bn": ("vgg19_bn", {"num_classes": 100}),
    "resnet18@64": ("resnet18", {"num_classes": 200, "image_size": 64}),
    "resnet50@224": ("resnet50", {"num_classes": 1000}),
    "vit_b_16": ("vit_b_16", {}),
    "gpt2": ("gpt2", {}),
}
#: Models whose path totals overflow float32: the SynFlow loop needs float64, or it keeps nothing.
WIDE = ("resnet50@224",)

Tick = Callable[[int, int], None]
"""Called as `tick(done, total)` while a run goes on."""


class Found(NamedTuple):
    """What a run kept; `log_paths` is None where no path is left."""

    kept: int
    log_paths: float | None


@dataclass(frozen=True)
class Effort:
    """How long iterative methods go on, the same on both sides."""

    dpai_steps: int = 300
    synflow_rounds: int = 100

    def of(self, method: str) -> int | None:
        return {"dpai": self.dpai_steps, "synflow": self.synflow_rounds}.get(method)


class Prepared(NamedTuple):
    model: nn.Module
    example: Tensor
    weights: int


def prepared(name: str) -> Prepared:
    """The model and one input of it."""
    from paikern import zoo
    from paikern.prunable import prunable_parameters

    kind, options = MODELS[name]
    model = zoo.create(kind, seed=SEED, **options).eval()
    weights = sum(math.prod(p.shape) for p in prunable_parameters(model).values())
    return Prepared(model, zoo.example_input(model), weights)


def run(
    who: str, method: str, name: str, subject: Prepared, sparsity: float, effort: Effort, tick: Tick
) -> Mapping[str, Tensor]:
    """One whole run; returns the bool masks by parameter name."""
    if who == OURS:
        return _ours(method, subject, sparsity, effort, tick)
    return _REFERENCES[method](name, subject, sparsity, effort, tick)


def quality(subject: Prepared, masks: Mapping[str, Tensor]) -> Found:
    """What is told beside the time: the same counts for both sides."""
    import paikern as pk

    found = pk.MaskSet.from_bool(dict(masks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        topology = pk.analyze(subject.model, found, example_inputs=subject.example)
    return Found(found.kept, topology.log_paths if topology.log_paths > -math.inf else None)


def _ours(
    method: str, subject: Prepared, sparsity: float, effort: Effort, tick: Tick
) -> Mapping[str, Tensor]:
    import paikern as pk

    options: dict[str, Any] = {}
    if method == "dpai":
        options = {"steps": effort.dpai_steps, "variant": "published"}
    if method == "synflow":
        options = {"rounds": effort.synflow_rounds, "variant": "published"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pk.prune(
            subject.model, method, sparsity=sparsity, example_inputs=subject.example, seed=SEED,
            apply=False, progress=lambda done, total, _: tick(done, total), **options,
        )  # fmt: skip


def _dpai(
    name: str, subject: Prepared, sparsity: float, effort: Effort, tick: Tick
) -> Mapping[str, Tensor]:
    from bench.references.dpai import DPaIReference

    loop = DPaIReference(subject.model, subject.example, sparsity, seed=SEED)
    for step in range(1, effort.dpai_steps + 1):
        loop.step()
        tick(step, effort.dpai_steps)
    return loop.masks()


def _synflow(
    name: str, subject: Prepared, sparsity: float, effort: Effort, tick: Tick
) -> Mapping[str, Tensor]:
    import torch

    from bench.references.synflow import synflow

    rounds = effort.synflow_rounds
    dtype = torch.float64 if name in WIDE else torch.float32
    return synflow(
        subject.model, subject.example, sparsity, rounds, dtype=dtype,
        report=lambda done: tick(done, rounds),
    )  # fmt: skip


def _npb(
    name: str, subject: Prepared, sparsity: float, effort: Effort, tick: Tick
) -> Mapping[str, Tensor]:
    from bench.references.npb import npb

    # The sizes above which programs are cut into pieces, as they are commonly run.
    above = 64 * 32 if name == "resnet20" else 128 * 128
    return npb(subject.model, subject.example, sparsity, chunk_above=above, seed=SEED, report=tick)


def _phew(
    name: str, subject: Prepared, sparsity: float, effort: Effort, tick: Tick
) -> Mapping[str, Tensor]:
    from bench.references.phew import phew

    return phew(subject.model, sparsity, seed=SEED, report=tick)


_REFERENCES: dict[str, Callable[..., Mapping[str, Tensor]]] = {
    "dpai": _dpai,
    "npb": _npb,
    "phew": _phew,
    "synflow": _synflow,
}
