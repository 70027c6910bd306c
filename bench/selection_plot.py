"""The picture of the selection benchmark: time over size, and ratios for each distribution."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import selection_contenders as who
from bench.timing import Row

COLORS = {
    who.OURS: "#2f7fc1",
    who.TOPK: "#e0841c",
    who.KTHVALUE: "#c94f4f",
    who.SORT: "#b25bb0",
    who.PARTITION: "#2e9c6a",
    who.NTH_ELEMENT: "#8a6d3b",
    who.READ: "#7d8a99",
}
BARS = (who.KTHVALUE, who.TOPK, who.NTH_ELEMENT, who.PARTITION)
KEEP = 0.1


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of the grid at 10 % and the highest number of threads."""
    threads = max((row["threads"] for row in rows), default=1)
    shown = [row for row in rows if row["keep"] == KEEP and row["threads"] == threads]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _times(left, [row for row in shown if row["distribution"] == "normal"], threads)
    _ratios(right, shown)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)


def _times(axes: Axes, rows: Sequence[Row], threads: int) -> None:
    sizes = sorted({row["size"] for row in rows})
    ours = [(n, statistics.median(r["seconds"] for r in rows if r["size"] == n)) for n in sizes]
    for name, color in COLORS.items():
        points = sorted((r["size"], r["reference_seconds"]) for r in rows if r["reference"] == name)
        if name == who.OURS:
            points = ours
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                label="read once" if name == who.READ else name,
                linewidth=2.4 if name == who.OURS else 1.3,
                linestyle="--" if name == who.READ else "-",
                marker="o",
                markersize=3.5,
            )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="scores (float32)",
        ylabel="seconds",
        title=f"Keep {KEEP:.0%} of normal magnitudes, {threads} threads",
    )
    if ours:
        axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _ratios(axes: Axes, rows: Sequence[Row]) -> None:
    """At the largest size that most distributions have with all of the contenders."""
    compared = [row for row in rows if row["reference"] == who.NTH_ELEMENT]
    counts: dict[int, int] = {}
    for row in compared:
        counts[row["size"]] = counts.get(row["size"], 0) + 1
    size = max(counts, key=lambda s: (counts[s], s), default=0)
    names = list(dict.fromkeys(row["distribution"] for row in compared if row["size"] == size))
    height = 0.8 / len(BARS)
    for index, contender in enumerate(BARS):
        ratios = {
            row["distribution"]: row["ratio"]
            for row in rows
            if row["size"] == size and row["reference"] == contender
        }
        places = [
            i + (index - (len(BARS) - 1) / 2) * height for i, n in enumerate(names) if n in ratios
        ]
        values = [ratios[name] for name in names if name in ratios]
        lengths = [value - 1 for value in values]  # from 1 on, to the left where we lose
        axes.barh(places, lengths, left=1, height=height, color=COLORS[contender], label=contender)
    axes.axvline(1, color="#1f2430", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(
        xscale="log",
        xlabel="time over paikern's (right of 1: paikern is faster)",
        title=f"Distributions, {size:,} scores, keep {KEEP:.0%}",
    )
    if names:
        axes.legend(frameon=False, fontsize=8)
    _plain(axes)
