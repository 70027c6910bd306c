"""Whole runs of SynFlow and PX, and DPaI steps, against the published-style loops.

SynFlow and PX are one call each, tracing included, of the model as it stands; the process has made
such a call before, so that what Python loads on first use is not counted. paikern's variants and
the loop run in turn. Runs of 100 rounds are chaotic: one rounding flip near a threshold grows, and
the same loop in float32 and float64 agrees on 85 to 100 % of what it keeps. So what is told beside
the time is the overlap after 3 rounds, where both must agree, and for the whole run the overlap,
the counts and the number of paths that are left.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import paikern as pk
from bench.references.synflow import synflow
from bench.timing import Row, interleave
from paikern import zoo

SEED = 0
SPARSITY = 0.98
ROUNDS, FEW_ROUNDS = 100, 3
SAMPLES = 100
VARIANTS = ("published", "paper")
#: name -> arguments of the zoo, repeats of the whole run
SYNFLOW = {"resnet20": ({"num_classes": 10}, 3), "vgg16_bn": ({"num_classes": 100}, 2)}

Masks = Mapping[str, Tensor]


def kept_count(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def overlap(ours: Masks, reference: Masks) -> float:
    """The share of what the reference keeps that is kept here too."""
    both = sum(int((ours[name] & mask).sum()) for name, mask in reference.items())
    return both / max(1, kept_count(reference))


def whole_runs(
    name: str,
    model: nn.Module,
    example: Tensor,
    ours: Mapping[str, Callable[[int], Masks]],
    reference: Callable[[int], Masks],
    *,
    method: str,
    rounds: int,
    repeats: int,
) -> list[Row]:
    """Time variant name -> `run(rounds)` of paikern in turn with the loop; a row each."""
    with warnings.catch_warnings():  # few rounds may leave a shortcut without weights
        warnings.simplefilter("ignore", pk.errors.PaikernWarning)
        early = reference(FEW_ROUNDS)
        agreed = {variant: overlap(run(FEW_ROUNDS), early) for variant, run in ours.items()}
    held: dict[str, Masks] = {}

    def keep(who: str, run: Callable[[int], Masks]) -> Callable[[], object]:
        return lambda: held.__setitem__(who, run(rounds))

    contenders = {variant: keep(variant, run) for variant, run in ours.items()}
    times = interleave(contenders | {"": keep("", reference)}, repeats=repeats, warmup=0)
    seconds = {who: statistics.median(samples) for who, samples in times.items()}
    paths = {who: _log_paths(model, masks, example) for who, masks in held.items()}
    return [
        {
            "section": "runs",
            "method": method,
            "model": name,
            "sparsity": SPARSITY,
            "variant": variant,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "seconds": seconds[variant],
            "reference_seconds": seconds[""],
            "ratio": seconds[""] / seconds[variant],
            "samples": repeats,
            "kept": kept_count(held[variant]),
            "reference_kept": kept_count(held[""]),
            "overlap": overlap(held[variant], held[""]),
            f"overlap_{FEW_ROUNDS}_rounds": agreed[variant],
            "log_paths": paths[variant],
            "reference_log_paths": paths[""],
        }
        for variant in ours
    ]


def _log_paths(model: nn.Module, masks: Masks, example: Tensor) -> float:
    held = pk.MaskSet.from_bool({name: mask.bool() for name, mask in masks.items()})
    return pk.analyze(model, held, example_inputs=example).log_paths


def compare_synflow(name: str, *, rounds: int = ROUNDS, repeats: int | None = None) -> list[Row]:
    """SynFlow in both variants against the loop. The loop's rules are those of "published"."""
    options, usual = SYNFLOW[name]
    model = zoo.create(name, seed=SEED, **options).eval()
    example = zoo.example_input(model)

    def ours(variant: str) -> Callable[[int], Masks]:
        return lambda rounds: pk.prune(
            model, "synflow", sparsity=SPARSITY, example_inputs=example, rounds=rounds,
            variant=variant, apply=False, progress=False,
        )  # fmt: skip

    return whole_runs(
        name,
        model,
        example,
        {variant: ours(variant) for variant in VARIANTS},
        lambda rounds: synflow(model, example, SPARSITY, rounds),
        method="synflow",
        rounds=rounds,
        repeats=repeats or usual,
    )


def px_reference() -> Callable[..., Masks] | None:
    """The loop of PX, where this checkout has it and the method."""
    try:
        from bench.references import px
    except ImportError:
        return None
    has_method: bool = "px" in pk.scorers.scorer_names()
    return px.px if has_method else None


def images(count: int, size: int = 32, seed: int = SEED) -> Tensor:
    """`[count, 3, size, size]` normal values: PX reads pixels, no labels."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def compare_px(*, rounds: int = ROUNDS, samples: int = SAMPLES, repeats: int = 2) -> list[Row]:
    """PX on ResNet-20 with the same images as one batch."""
    reference = px_reference()
    if reference is None:
        print("px: not in this checkout, left out")
        return []
    model = zoo.create("resnet20", seed=SEED, num_classes=10).eval()
    data = images(samples)

    def ours(rounds: int) -> Masks:
        return pk.prune(
            model, "px", sparsity=SPARSITY, example_inputs=data[:1], data=[data], rounds=rounds,
            apply=False, progress=False,
        )  # fmt: skip

    rows = whole_runs(
        "resnet20",
        model,
        data[:1],
        {"paper": ours},
        lambda rounds: reference(model, [data], SPARSITY, rounds),
        method="px",
        rounds=rounds,
        repeats=repeats,
    )
    return [row | {"section": "px", "images": samples} for row in rows]


def compare_dpai(name: str, *, quick: bool) -> Row:
    """One DPaI step, published variant: the row of `bench.run_dpai`."""
    from bench.run_dpai import compare_steps

    row: dict[str, Any] = compare_steps(name, repeats=1 if quick else None)
    return row | {"section": "dpai", "threads": torch.get_num_threads()}
