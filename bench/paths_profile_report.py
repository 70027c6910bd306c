"""The tables of `bench/paths_profile.py`: what took how long, and what it could have taken."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench import paths_profile
from bench.paths_profile import PARTS, Layer, layer_from
from bench.paths_results import part
from bench.references.peaks import Peaks
from bench.selection_report import ratio_text, table
from bench.timing import Row

LISTED = 12  # layers that are listed by name


class Cost(NamedTuple):
    """Seconds of each part of some layers, the limits of the same, and what bounds them."""

    seconds: dict[str, float]
    limits: dict[str, float]
    bytes: int
    multiply_adds: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def limit(self) -> float:
        return sum(self.limits.values())


def cost_of(rows: Sequence[Row], peaks: Peaks) -> Cost:
    """Of layers as they were written."""
    layers = [layer_from(row) for row in rows]

    def summed(value: Callable[[Layer, str], Any]) -> dict[str, Any]:
        return {part: sum(value(layer, part) for layer in layers) for part in PARTS}

    return Cost(
        {part: sum(row[part] for row in rows) for part in PARTS},
        summed(lambda layer, part: layer.limit(part, peaks)),
        sum(summed(Layer.bytes).values()),
        sum(summed(Layer.multiply_adds).values()),
    )


def selection_limit(layers: Sequence[Row], peaks: Peaks) -> float:
    """Every score is read once and a bit written for each."""
    weights = sum(int(row["weights"]) for row in layers)
    return 4 * weights / peaks.read + weights / 8 / peaks.copy


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}" if abs(seconds) < 0.01 else f"{1e3 * seconds:.1f}"


def _cells(cost: Cost) -> list[str]:
    return [
        *(milliseconds(cost.seconds[part]) for part in PARTS),
        milliseconds(cost.total),
        milliseconds(cost.limit),
        ratio_text(cost.total / cost.limit),
        f"{cost.bytes / 1e6:.1f}",
        f"{cost.multiply_adds / 1e6:.1f}",
    ]


HEADER = [*(f"{part} ms" for part in PARTS), "sum ms", "limit ms", "x limit", "MB", "M mul-adds"]


def one_profile(profile: Mapping[str, Any], peaks: Peaks) -> list[str]:
    """By kind of layer with the whole at the end, then the layers that take longest."""
    layers = [row | {"weights": _weights(row)} for row in profile["layers"]]
    kinds = dict.fromkeys(row["kind"] for row in layers)
    body = []
    for kind in kinds:
        rows = [row for row in layers if row["kind"] == kind]
        body.append([kind, str(len(rows)), *_cells(cost_of(rows, peaks))])
    parts, selection = cost_of(layers, peaks), profile["selection"]
    least = selection_limit(layers, peaks)
    whole, limit = profile["seconds"], parts.limit + least
    blank = [""] * len(PARTS)
    rest = whole - parts.total - selection
    for name, seconds, floor in (("selection", selection, least), ("rest", rest, None)):
        distance = ratio_text(seconds / floor) if floor else ""
        cells = [milliseconds(seconds), milliseconds(floor) if floor else "", distance]
        body.append([name, "", *blank, *cells, "", ""])
    total = ["**step**", str(len(layers)), *blank, milliseconds(whole), milliseconds(limit)]
    body.append([*total, ratio_text(whole / limit), "", ""])
    slowest = sorted(layers, key=lambda row: -sum(row[part] for part in PARTS))[:LISTED]
    listed = [
        [
            f"`{row['name'].removesuffix('.weight')}`",
            " x ".join(map(str, row["weight"])),
            " x ".join(map(str, row["y"][2:])) or "1",
            f"{row['kept'] / row['weights']:.1%}",
            *_cells(cost_of([row], peaks)),
        ]
        for row in slowest
    ]
    title = f"### {profile['model']}, {profile['sparsity']:.0%}, {profile['threads']} threads"
    return [
        title,
        "",
        *table(["layers", "count", *HEADER], body),
        f"The {len(listed)} layers that take longest:",
        "",
        *table(["layer", "weight", "map", "kept", *HEADER], listed, left=2),
    ]


def _weights(row: Row) -> int:
    count = 1
    for size in row["weight"]:
        count *= size
    return count


def profile_lines(results: Mapping[str, Any]) -> list[str]:
    """What the module says of its method, and the tables of every profile."""
    profiles, peaks = part(results, "profile", "models"), part(results, "profile", "peaks")
    if not profiles or not peaks:
        return ["Not measured in this run.", ""]
    method = inspect.cleandoc(paths_profile.__doc__ or "").partition("\n\n")[2]
    lines = [*method.splitlines(), ""]
    for profile in profiles:
        lines += one_profile(profile, Peaks(**peaks))
    return lines
