"""Where the rows of the quality study contradict what is published, found from the rows.

A claim is an order of methods by accuracy as a paper, a poster or a talk prints it, with the
figures. A pair is contradicted where the lower one is ahead here by more than the two standard
deviations over the seeds together.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.timing import Row


class Claim(NamedTuple):
    """Accuracies as printed, in percent, by the name of the row; `where` is what they are of."""

    source: str
    where: str
    accuracy: Mapping[str, float]
    nets: tuple[str, ...]
    sparsities: tuple[float, ...]


_CONVOLUTIONS = ("resnet20", "vgg16_bn/8")

CLAIMS = (
    Claim(
        "PX, table 2", "ResNet-20 on CIFAR-10 at 98.2 %, 100 rounds where there are rounds",
        {
            "px": 77.08, "grasp": 76.30, "magnitude": 76.12, "snip": 75.39, "synflow": 75.19,
            "ntk_sap": 74.55,
        },
        ("resnet20",), (0.98,),
    ),
    Claim(
        "EarlyCroP, slides", "98 %, network and data set not named",
        {
            "earlycrop_u": 65.1, "ltr": 64.7, "crop": 63.8, "grasp": 63.4, "snip": 61.9,
            "cropit": 56.3, "random_u": 55.8,
        },
        _CONVOLUTIONS, (0.98,),
    ),
    Claim(
        "EarlyCroP, slides, structured", "98 % of the weights, network and data set not named",
        {
            "earlycrop_s": 62.2, "earlybird_ticket": 60.7, "crop_s": 57.4, "cropit_s": 56.5,
            "gate_decorators": 55.0, "random_s": 53.9, "snap": 49.3, "l1_filters": 29.5,
        },
        _CONVOLUTIONS, (0.98,),
    ),
    Claim(
        "ASNI, table 2", "a fully connected network on MNIST at 96.87 %",
        {"asni, centroids": 96.93, "dense": 96.88, "asni, original init": 96.75, "asni": 96.72},
        ("lenet300",), (0.95, 0.98),
    ),
)  # fmt: skip

#: "consistently outperforms prior methods", the DPaI poster, without legible figures.
PRIOR_TO_DPAI = ("random", "magnitude", "snip", "grasp", "synflow", "phew", "npb")
#: "significantly outperforms PHEW and NPB in pruning speed under large-scale settings", the same.
SLOWER_THAN_DPAI = ("phew", "npb")
#: SynFlow is proven not to empty a layer before it must (Tanaka et al. 2020).
NEVER_EMPTY = "synflow"


class Mean(NamedTuple):
    """Over the seeds; one seed has no spread."""

    value: float
    spread: float | None

    @property
    def text(self) -> str:
        return f"{self.value:.2f}"


def mean(rows: Sequence[Row], name: str, sparsity: float) -> Mean | None:
    """Accuracy in percent of a row name at a sparsity, over the seeds; "dense" has none."""
    wanted = 0.0 if name == "dense" else sparsity
    found = [
        100 * r["accuracy"]
        for r in rows
        if (r["method"], r["sparsity"]) == (name, wanted) and "accuracy" in r
    ]
    if not found:
        return None
    return Mean(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else None)


def behind(upper: Mean | None, lower: Mean | None) -> bool:
    """Whether `upper`, said to be ahead, is behind by more than both spreads together."""
    if upper is None or lower is None or upper.spread is None or lower.spread is None:
        return False
    return lower.value - upper.value > upper.spread + lower.spread


def notes(rows: Sequence[Row], net: str, sparsity: float) -> list[str]:
    """What the trained rows of one network at one sparsity contradict, one line a method."""
    found = []
    for claim in CLAIMS:
        if net in claim.nets and sparsity in claim.sparsities:
            found += _order(rows, claim, sparsity)
    found += _poster(rows, sparsity)
    return found + _collapse(rows, sparsity)


def speed_notes(rows: Sequence[Row]) -> list[str]:
    """What the pruning times of the networks that are not trained contradict."""
    found = []
    for model, sparsity in sorted({(r["model"], r["sparsity"]) for r in rows}):
        times = {
            r["method"]: r["seconds"]
            for r in rows
            if (r["model"], r["sparsity"]) == (model, sparsity)
        }
        faster = [
            f"{name} {times[name]:.2f} s"
            for name in SLOWER_THAN_DPAI
            if times.get(name, math.inf) < times.get("dpai", -math.inf)
        ]
        if faster:
            found.append(
                "The DPaI poster says that it is faster than PHEW and NPB on large networks; on "
                f"{model} at {sparsity:.0%} dpai takes {times['dpai']:.2f} s, {', '.join(faster)}."
            )
    return found


def _order(rows: Sequence[Row], claim: Claim, sparsity: float) -> list[str]:
    lines = []
    names = sorted(claim.accuracy, key=lambda name: -claim.accuracy[name])
    for place, name in enumerate(names):
        upper = mean(rows, name, sparsity)
        ahead = [n for n in names[place + 1 :] if behind(upper, mean(rows, n, sparsity))]
        if upper is None or not ahead:
            continue
        listed = ", ".join(
            f"{n} ({found.text} here, {claim.accuracy[n]:g} there)"
            for n in ahead
            if (found := mean(rows, n, sparsity)) is not None
        )
        lines.append(
            f"{claim.source} ({claim.where}): {name} ({upper.text} here, {claim.accuracy[name]:g} "
            f"there) is behind {listed}."
        )
    return lines


def _poster(rows: Sequence[Row], sparsity: float) -> list[str]:
    ours = mean(rows, "dpai", sparsity)
    ahead = [
        f"{name} ({found.text})"
        for name in PRIOR_TO_DPAI
        if (found := mean(rows, name, sparsity)) is not None and behind(ours, found)
    ]
    if ours is None or not ahead:
        return []
    return [
        f"The DPaI poster says that it outperforms prior methods consistently; here dpai "
        f"({ours.text}) is behind {', '.join(ahead)}."
    ]


def _collapse(rows: Sequence[Row], sparsity: float) -> list[str]:
    empty = [
        r["empty_layers"]
        for r in rows
        if (r["method"], r["sparsity"]) == (NEVER_EMPTY, sparsity) and r.get("empty_layers")
    ]
    if not empty:
        return []
    return [
        f"SynFlow is proven not to empty a layer where layers form a chain; here {NEVER_EMPTY} "
        f"empties up to {max(empty)}."
    ]
