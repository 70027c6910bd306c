"""Whole runs of SynFlow and PX, and DPaI steps, against the published-style loops.

SynFlow and PX are one call each, tracing included, of the model as it stands; the process has made
such a call before, so that what Python loads on first use is not counted. paikern's variants and
the loop run in turn. Runs of 100 rounds are chaotic: one rounding flip near a threshold grows, and
the same loop in float32 and float64 agrees on 85 to 100 % of what it keeps. So what is told beside
the time is the overlap after 3 rounds, where both must agree, and for the whole run the overlap,
the counts and the number of paths that are left.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import paikern as pk
from bench.references.px import px
from bench.references.synflow import synflow
from bench.timing import Row, interleave
from paikern import zoo
from paikern.errors import PaikernWarning

SEED = 0
SPARSITY = 0.98
ROUNDS, FEW_ROUNDS = 100, 3
SAMPLES = 100
VARIANTS = ("published", "paper")
#: name -> arguments of the zoo, repeats of the whole run
SYNFLOW = {"resnet20": ({"num_classes": 10}, 3), "vgg16_bn": ({"num_classes": 100}, 2)}

LOOP, ONE_H = "loop", "loop, h on one sample"

Masks = Mapping[str, Tensor]
Run = Callable[[int], Masks]  # of so many rounds


def kept_count(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def overlap(ours: Masks, reference: Masks) -> float:
    """The share of what the reference keeps that is kept here too."""
    both = sum(int((ours[name] & mask).sum()) for name, mask in reference.items())
    return both / max(1, kept_count(reference))


def whole_runs(
    model: nn.Module,
    example: Tensor,
    ours: Mapping[str, Run],
    loops: Mapping[str, Run],
    *,
    rounds: int,
    repeats: int,
    check: Run | None = None,
) -> list[Row]:
    """Time variants of paikern in turn with the loops; a row for each pair.

    The overlap after `FEW_ROUNDS` is that with `check`, the first loop unless another is given.
    """
    held: dict[str, Masks] = {}

    def keep(who: str, run: Run) -> Callable[[], object]:
        return lambda: held.__setitem__(who, run(rounds))

    with warnings.catch_warnings():  # few rounds may leave a shortcut without weights
        warnings.simplefilter("ignore", PaikernWarning)
        early = (check or next(iter(loops.values())))(FEW_ROUNDS)
        agreed = {variant: overlap(run(FEW_ROUNDS), early) for variant, run in ours.items()}
        contenders = {who: keep(who, run) for who, run in {**ours, **loops}.items()}
        times = interleave(contenders, repeats=repeats, warmup=0)
    seconds = {who: statistics.median(samples) for who, samples in times.items()}
    paths = {who: _log_paths(model, masks, example) for who, masks in held.items()}
    return [
        {
            "sparsity": SPARSITY,
            "variant": variant,
            "reference": loop,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
            "seconds": seconds[variant],
            "reference_seconds": seconds[loop],
            "ratio": seconds[loop] / seconds[variant],
            "samples": repeats,
            "kept": kept_count(held[variant]),
            "reference_kept": kept_count(held[loop]),
            "overlap": overlap(held[variant], held[loop]),
            f"overlap_{FEW_ROUNDS}_rounds": agreed[variant],
            "log_paths": paths[variant],
            "reference_log_paths": paths[loop],
        }
        for variant in ours
        for loop in loops
    ]


def _log_paths(model: nn.Module, masks: Masks, example: Tensor) -> float | None:
    """None where no path is left, which JSON has no number for."""
    held = pk.MaskSet.from_bool({name: mask.bool() for name, mask in masks.items()})
    found = pk.analyze(model, held, example_inputs=example).log_paths
    return found if math.isfinite(found) else None


def compare_synflow(name: str, *, rounds: int = ROUNDS, repeats: int | None = None) -> list[Row]:
    """SynFlow in both variants against the loop. The loop's rules are those of "published"."""
    options, usual = SYNFLOW[name]
    model = zoo.create(name, seed=SEED, **options).eval()
    example = zoo.example_input(model)

    def ours(variant: str) -> Run:
        return lambda rounds: pk.prune(
            model, "synflow", sparsity=SPARSITY, example_inputs=example, rounds=rounds,
            variant=variant, apply=False, progress=False,
        )  # fmt: skip

    rows = whole_runs(
        model,
        example,
        {variant: ours(variant) for variant in VARIANTS},
        {LOOP: lambda rounds: synflow(model, example, SPARSITY, rounds)},
        rounds=rounds,
        repeats=repeats or usual,
    )
    return [{"section": "runs", "method": "synflow", "model": name, **row} for row in rows]


def images(count: int, size: int = 32, seed: int = SEED) -> Tensor:
    """`[count, 3, size, size]` normal values: PX reads pixels, no labels."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def compare_px(*, rounds: int = ROUNDS, samples: int = SAMPLES, repeats: int = 2) -> list[Row]:
    """PX on ResNet-20, all images in one batch, against the loop in two forms.

    In float32 the loop's scores overflow and it keeps nothing, in the same time as a run that
    would; what paikern keeps is compared with the loop in float64.
    """
    model = zoo.create("resnet20", seed=SEED, num_classes=10).eval()
    data = images(samples)

    def ours(rounds: int) -> Masks:
        return pk.prune(
            model, "px", sparsity=SPARSITY, example_inputs=data[:1], data=data, rounds=rounds,
            apply=False, progress=False,
        )  # fmt: skip

    def loop(one_h: bool, dtype: torch.dtype = torch.float32) -> Run:
        return lambda rounds: px(model, [data], SPARSITY, rounds, one_h=one_h, dtype=dtype)

    rows = whole_runs(
        model,
        data[:1],
        {"paper": ours},
        {LOOP: loop(False), ONE_H: loop(True)},
        rounds=rounds,
        repeats=repeats,
        check=loop(True, torch.float64),
    )
    about = {"section": "px", "method": "px", "model": "resnet20", "images": samples}
    return [about | row for row in rows]


def compare_dpai(name: str, *, quick: bool) -> Row:
    """One DPaI step, published variant: the row of `bench.run_dpai`."""
    from bench.run_dpai import compare_steps

    row: dict[str, Any] = compare_steps(name, repeats=1 if quick else None)
    return row | {"section": "dpai", "threads": torch.get_num_threads()}
