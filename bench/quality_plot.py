"""The pictures of the quality study: accuracy against sparsity, and the node-path plane."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.quality_ways import DENSE, FAMILIES, NETS, NO_DATA, WAYS, rows_of
from bench.timing import Row

_MARKERS = "osD^v<>Ph*Xpd"
_SWEEPS = {
    ("ascent", False): ("#2f7fc1", "o"), ("ascent", True): ("#3a9d6e", "s"),
    ("adam", False): ("#e0841c", "^"), ("adam", True): ("#c15a8c", "D"),
}  # fmt: skip


def write_plots(rows: Sequence[Row], folder: Path) -> None:
    """Write `quality.png` and, where there is a sweep, `node_paths.png`."""
    nets = [name for name in NETS if any(row.get("model") == name for row in rows)]
    families = [family for family in FAMILIES if any(_of_family(rows, net, family) for net in nets)]
    tall, wide = max(1, len(families)), max(1, len(nets))
    figure = Figure(figsize=(6.4 * wide, 4.4 * tall), layout="constrained")
    for line, family in zip(figure.subplots(tall, wide, squeeze=False), families, strict=False):
        for axes, name in zip(line, nets, strict=True):
            _accuracy(axes, _trained(rows, name), name, family)
    _save(figure, folder / "quality.png")
    sweep = [row for row in rows if row.get("op") == "sweep"]
    if not sweep:
        return
    figure = Figure(figsize=(12.8, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plane(left, _trained(rows, "resnet20"))
    _sweep(right, sweep)
    _save(figure, folder / "node_paths.png")


def _trained(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows of a network that was trained."""
    return [row for row in rows if row.get("model") == name and "accuracy" in row]


def _names(family: str) -> list[str]:
    return [name for way in WAYS if WAYS[way].family == family for name in rows_of(way)]


def _of_family(rows: Sequence[Row], net: str, family: str) -> list[Row]:
    names = set(_names(family))
    return [row for row in _trained(rows, net) if row["method"] in names]


def _sparsities(rows: Sequence[Row]) -> list[float]:
    return sorted({row["sparsity"] for row in rows} - {0.0})


def _style(name: str, family: str) -> dict[str, object]:
    index = _names(family).index(name)
    return {"color": colormaps["tab20"](index % 20), "marker": _MARKERS[index % len(_MARKERS)]}


def _accuracy(axes: Axes, rows: Sequence[Row], name: str, family: str) -> None:
    for way in _names(family):
        points = []
        for sparsity in _sparsities(rows):
            found = [r["accuracy"] for r in rows if (r["method"], r["sparsity"]) == (way, sparsity)]
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                points.append((100 * sparsity, 100 * statistics.mean(found), 100 * spread))
        if points:
            xs, ys, errors = zip(*points, strict=True)
            axes.errorbar(
                xs,
                ys,
                errors,
                label=way,
                linewidth=1.3,
                markersize=4,
                capsize=2,
                **_style(way, family),
            )  # type: ignore[arg-type]
    dense = [r["accuracy"] for r in rows if r["method"] == DENSE]
    if dense:
        axes.axhline(
            100 * statistics.mean(dense), color="#7d8a99", linestyle="--", linewidth=1, label=DENSE
        )
    axes.set(xlabel="sparsity %", ylabel="accuracy %", title=f"{name}, {FAMILIES[family]}")
    _finish(axes)


def _plane(axes: Axes, rows: Sequence[Row]) -> None:
    """Every method without data at every sparsity, joined in the order of the sparsity."""
    for way in _names(NO_DATA):
        points = []
        for sparsity in _sparsities(rows):
            found = [r for r in rows if (r["method"], r["sparsity"]) == (way, sparsity)]
            if found:
                nodes = statistics.mean(r["nodes"] for r in found)
                paths = [r["log_paths"] for r in found if r["log_paths"] is not None]
                if paths:
                    points.append((nodes, statistics.mean(paths)))
        if points:
            axes.plot(*zip(*points, strict=True), label=way, linewidth=1, markersize=4,
                      **_style(way, NO_DATA))  # type: ignore[arg-type]  # fmt: skip
    axes.set(
        xlabel="effective nodes", ylabel="ln effective paths",
        title="ResNet-20, 90 to 99 %",
    )  # fmt: skip
    _finish(axes)


def _sweep(axes: Axes, rows: Sequence[Row]) -> None:
    for (optimizer, keep), (color, marker) in _SWEEPS.items():
        found = [r for r in rows if (r["optimizer"], r["keep_nodes"]) == (optimizer, keep)]
        axes.scatter(
            [r["nodes"] for r in found], [r["log_paths"] for r in found], color=color,
            marker=marker, s=26, label=f"{optimizer}{', keep_nodes' if keep else ''}",
        )  # fmt: skip
        for row in found:
            axes.annotate(
                f"{row['alpha']:g}/{row['beta']:g}", (row["nodes"], row["log_paths"]),
                fontsize=5.5, xytext=(3, 2), textcoords="offset points",
            )  # fmt: skip
    axes.set(
        xlabel="effective nodes", ylabel="ln effective paths",
        title="DPaI, ResNet-20 at 98 %: alpha/beta",
    )  # fmt: skip
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=6.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})
    os.replace(temporary, path)
