"""The picture of the path benchmark: time and memory of a SynFlow round over the weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.paths_process import LOOP, OURS
from bench.paths_scaling import FITTED, by_who, slope
from bench.timing import Row

COLORS = {OURS: "#2f7fc1", LOOP: "#e0841c"}
NAMES = {OURS: "paikern", LOOP: "PyTorch loop"}
MODEL_BYTES = 4  # of a float32 weight


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows of the scaling study."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, by_who(rows, "round_seconds"), "seconds", "A round of SynFlow", fitted=True)
    memory = by_who(rows, "extra_bytes")
    _draw(right, memory, "bytes", "Peak memory beyond the model", fitted=False)
    sizes = sorted({x for points in memory.values() for x, _ in points})
    if sizes:
        right.plot(
            sizes,
            [MODEL_BYTES * x for x in sizes],
            color="#7d8a99",
            linestyle="--",
            linewidth=1.3,
            label="the weights themselves",
        )
        right.legend(frameon=False, fontsize=8)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _draw(
    axes: Axes, held: dict[str, list[tuple[float, float]]], unit: str, title: str, *, fitted: bool
) -> None:
    for who, points in held.items():
        exponent = slope(points) if fitted else None
        label = NAMES[who] if exponent is None else f"{NAMES[who]}, slope {exponent:.3f}"
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=COLORS[who],
            label=label,
            linewidth=2.4 if who == OURS else 1.3,
            marker="o",
            markersize=3.5,
        )
    if fitted:
        axes.axvspan(*(m * 2**20 for m in FITTED), color="#7d8a99", alpha=0.1, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="weights (float32)", ylabel=unit, title=title)
    if held:
        axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
