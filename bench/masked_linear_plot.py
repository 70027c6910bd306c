"""The picture of the packed-weight benchmark: where packing wins, and where it loses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.timing import Row

SIZE = "4096x4096"
STEPS = ("forward", "backward", "step")


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the ratio to the best dense library over sparsity, one line a batch size."""
    steps = [s for s in STEPS if any(row["op"] == f"masked_linear {s}" for row in rows)]
    figure = Figure(figsize=(5.2 * max(1, len(steps)), 4.4), layout="constrained")
    panels = figure.subplots(1, max(1, len(steps)), squeeze=False, sharey=True)[0]
    for axes, step in zip(panels, steps, strict=False):
        _crossover(
            axes, [r for r in rows if r["op"] == f"masked_linear {step}" and r["size"] == SIZE]
        )
        axes.set_title(f"{SIZE}, {step}")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _crossover(axes: Axes, rows: Sequence[Row]) -> None:
    batches = sorted({row["batch"] for row in rows})
    colors = colormaps["viridis"]
    for index, batch in enumerate(batches):
        points = sorted((row["sparsity"], row["ratio"]) for row in rows if row["batch"] == batch)
        axes.plot(
            [f"{100 * sparsity:g}" for sparsity, _ in points],
            [ratio for _, ratio in points],
            color=colors(0.92 * index / max(1, len(batches) - 1)),
            marker="o",
            markersize=3.5,
            label=f"N = {batch}",
        )
    axes.axhline(1, color="#c94f4f", linewidth=1.2)
    axes.set(yscale="log", xlabel="sparsity, %", ylabel="times as fast as the best dense library")
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)
    if batches:
        axes.legend(frameon=False, fontsize=8, ncols=2)
