"""The picture of the comparison: time against sparsity and size, memory, speed-up."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.comparison_rows import shown_ratio
from bench.timing import Row

COLORS = {"dpai": "#2f7fc1", "npb": "#3a9d6e", "phew": "#c15a8c", "synflow": "#e0841c"}
NAMES = {"dpai": "DPaI", "npb": "NPB", "phew": "PHEW", "synflow": "SynFlow"}
SIDES = (("", "-", "o", "paikern"), ("reference_", "--", "x", "reference"))
MIB = 2**20


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw all rows. A run that was stopped is drawn at its limit, with an arrow upwards."""
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    (by_sparsity, by_size), (memory, bars) = figure.subplots(2, 2)
    _draw_sparsity(by_sparsity, rows)
    model = _at_every_size(rows)
    _draw_size(by_size, model, "seconds", "Pruning time against network size", 1.0, "seconds")
    _draw_size(memory, model, "peak_bytes", "Peak memory beyond the model", MIB, "MiB")
    _draw_bars(bars, model)
    for axes in (by_sparsity, by_size, memory, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.set_axisbelow(True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    os.replace(temporary, path)


def _at_every_size(rows: Sequence[Row]) -> list[Row]:
    """The rows of the sparsity that most networks were pruned to."""
    counts: dict[float, set[str]] = {}
    for row in rows:
        counts.setdefault(row["sparsity"], set()).add(row["model"])
    common = max(counts, key=lambda s: (len(counts[s]), s))
    return [row for row in rows if row["sparsity"] == common]


def _draw_sparsity(axes: Axes, rows: Sequence[Row]) -> None:
    """The network with the most sparsities; the largest of several."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    model = max(by_model, key=lambda m: (len(by_model[m]), _weights(by_model[m])))
    title = f"Pruning time of {model}"
    _curves(axes, by_model[model], lambda row: 100 * row["sparsity"], "seconds", 1.0)
    axes.set(yscale="log", xlabel="sparsity %", ylabel="seconds", title=title)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _draw_size(
    axes: Axes, rows: Sequence[Row], column: str, title: str, unit: float, label: str
) -> None:
    _curves(axes, rows, lambda row: row.get("weights"), column, unit)
    axes.set(xscale="log", yscale="log", xlabel="prunable weights", ylabel=label, title=title)


def _curves(
    axes: Axes,
    rows: Sequence[Row],
    position: Callable[[Row], float | None],
    column: str,
    unit: float,
) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        for prefix, line, marker, side in SIDES:
            points = sorted(
                (x, row[prefix + column] / unit, row[f"{prefix}status"] != "finished")
                for row in rows
                if row["method"] == method
                and (x := position(row)) is not None
                and row[prefix + column] is not None
            )
            if not points:
                continue
            xs, ys, stopped = zip(*points, strict=True)
            axes.plot(
                xs, ys, linestyle=line, marker=marker, markersize=4, color=COLORS[method],
                linewidth=2.2 if not prefix else 1.2, label=f"{NAMES[method]}, {side}",
            )  # fmt: skip
            for x, y, open_end in zip(xs, ys, stopped, strict=True):
                if open_end:
                    axes.annotate(
                        "", (x, y * 1.5), (x, y),
                        arrowprops={"arrowstyle": "->", "color": COLORS[method]},
                    )  # fmt: skip


def _draw_bars(axes: Axes, rows: Sequence[Row]) -> None:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        for at, model in enumerate(models):
            found = [r for r in rows if (r["method"], r["model"]) == (method, model)]
            shown = shown_ratio(found[0]) if found else None
            if shown is None:
                continue
            stopped = shown[1] == ">"
            axes.bar(
                at + (index - (len(methods) - 1) / 2) * width, shown[0], width,
                color=COLORS[method], alpha=0.5 if stopped else 1.0,
                hatch="//" if stopped else None, label=NAMES[method],
            )  # fmt: skip
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.axhline(1, color="#7d8a99", linewidth=1)
    axes.set(
        yscale="log",
        ylabel="reference / paikern",
        title="Speed-up (hatched: at least)",
    )
    axes.set_xticks(range(len(models)), models, rotation=20, fontsize=8)
    axes.legend(unique.values(), unique.keys(), frameon=False, fontsize=7)


def _weights(rows: Sequence[Row]) -> int:
    return max(row.get("weights", 0) for row in rows)
