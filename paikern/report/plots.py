"""The plots of a pruning run. Every function returns a matplotlib `Figure`, or None for no data.

Figures are drawn without pyplot, so no display and no global state takes part. `svg` makes text
and axes take the colour of the page around them, which is what a light and a dark page share.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from paikern.analysis import Topology
from paikern.masks import MaskSet
from paikern.report.tables import log_text, printable, shape_text

INK = "#1f2430"  # replaced by currentColor in SVG, so no data may have this colour
COLORS = ("#2f7fc1", "#e0841c", "#2e9c6a", "#b25bb0", "#c94f4f", "#7d8a99")  # [series]
BLUE, ORANGE, _, _, RED, _ = COLORS

_NAMED_ROWS = 64  # above that the names would be smaller than anyone reads
_PICTURES = 8
_PICTURE_WEIGHTS = 300_000  # a pixel a weight must still fit a screen
_STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 9,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "paikern",
    "text.color": INK,
    "text.parse_math": False,  # a "$" in a layer's name is a "$"
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_LABELS = {
    "log_paths": "log effective paths",
    "log_flow": "log synaptic flow",
    "effective_nodes": "effective nodes",
    "effective_kernels": "effective kernels",
    "effective_params": "effective parameters",
    "density": "density",
}
_TOTALS = ("log_paths", "effective_nodes", "effective_kernels", "effective_params")


def svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element for a page; `prefix` keeps ids of several apart."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return re.sub(re.escape(INK), "currentColor", text, flags=re.IGNORECASE)


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure on white, for places that show no SVG."""
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": ""})
    return buffer.getvalue()


def density_figure(masks: MaskSet, topology: Topology | None = None) -> Figure | None:
    """Density of each layer, and with `topology` the part on a path and the living nodes."""
    kept, shapes = masks.kept_by_layer, masks.shapes
    names = [name for name in masks if math.prod(shapes[name])]
    if not names:
        return None
    density = np.array([kept[name] / math.prod(shapes[name]) for name in names])  # [layers]
    layers = {} if topology is None else {layer.name: layer for layer in topology.layers}
    known = all(name in layers for name in names) and topology is not None
    with mpl.rc_context(_STYLE):
        named = len(names) <= _NAMED_ROWS
        height = 0.19 * len(names) + 1.1 if named else 6.0
        figure = Figure(figsize=(8.6, height), layout="constrained")
        panels = figure.subplots(1, 2 if known else 1, sharey=True, squeeze=False)[0]
        _density_panel(panels[0], density)
        if known:
            on_path = [layers[n].effective_params / layers[n].numel for n in names]
            _density_panel(panels[0], np.array(on_path), hollow=True)
            nodes = np.array([layers[n].effective_nodes / max(layers[n].nodes, 1) for n in names])
            _nodes_panel(panels[1], nodes)
            panels[1].tick_params(axis="y", length=0)
        _rows(panels[0], names, named)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _density_panel(axes: Axes, density: np.ndarray, hollow: bool = False) -> None:
    rows = np.arange(len(density))
    alive = density > 0
    if hollow:
        hole: Any = {"ms": 7.5, "mfc": "none", "mec": ORANGE, "mew": 1.0}
        axes.plot(density[alive], rows[alive], "o", label="on a path", **hole)
        return
    axes.set_xscale("log")
    least = density[alive].min() if alive.any() else 0.01
    edge = 10 ** math.floor(math.log10(least) - 0.15)
    axes.set_xlim(edge, 1.25)
    axes.hlines(rows[alive], edge, density[alive], color=BLUE, lw=1.0, alpha=0.35)
    axes.plot(density[alive], rows[alive], "o", ms=4, color=BLUE, label="kept")
    if not alive.all():
        empty = rows[~alive]
        axes.plot([edge * 1.15] * len(empty), empty, "x", ms=5, color=RED, label="nothing kept")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("density (logarithmic)")
    axes.grid(axis="x")


def _nodes_panel(axes: Axes, share: np.ndarray) -> None:
    rows = np.arange(len(share))
    axes.barh(rows, share, height=0.62, color=BLUE, alpha=0.75)
    for row in rows[share == 0]:
        axes.plot(0.012, row, "x", ms=5, color=RED)
    axes.set_xlim(0, 1.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlabel("effective nodes")
    axes.grid(axis="x")


def _rows(axes: Axes, names: Sequence[str], named: bool) -> None:
    """Layers from top to bottom; names as long as there are few enough to read."""
    if named:
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("layer, in model order")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def run_figure(histories: Mapping[str, Any]) -> Figure | None:
    """What a run wrote down after each step or round: one panel a quantity, one line a run.

    Args:
        histories: label -> `masks.metadata["history"]`; entries that are no numbers are left out,
            since files come from anywhere.
    """
    runs = {label: _numbers(history) for label, history in histories.items()}
    counted = " or ".join(dict.fromkeys(_unit(history) for history in histories.values()))
    keys = list(dict.fromkeys(key for _, run in runs.values() for key in run))
    keys = [k for k in keys if any(len(run.get(k, ())) > 1 for _, run in runs.values())][:6]
    if not keys:
        return None
    columns = min(2, len(keys))
    count = math.ceil(len(keys) / columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 2.15 * count + 0.2), layout="constrained")
        panels = figure.subplots(count, columns, squeeze=False).ravel()
        for axes, key in zip(panels, keys, strict=False):
            for index, (label, (x, run)) in enumerate(runs.items()):
                if key in run:
                    color = COLORS[index % len(COLORS)]
                    axes.plot(x, run[key], color=color, lw=1.5, label=printable(label))
            axes.set_title(_LABELS.get(key, printable(key)))
            axes.set_xlabel(counted)
            axes.grid(axis="y")
        for axes in panels[len(keys) :]:
            axes.remove()
        if len(runs) > 1:
            panels[0].legend(loc="lower right")
    return figure


def _numbers(history: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The step or round of each entry, and key -> one float an entry, NaN where it is missing."""
    entries = history if isinstance(history, list) else []
    entries = [entry for entry in entries if isinstance(entry, Mapping)]
    keys = [key for key in entries[0] if isinstance(key, str)] if entries else []
    found = {key: np.array([_number(entry.get(key)) for entry in entries]) for key in keys}
    x = found.pop("step", found.pop("round", None))
    if x is None or not np.isfinite(x).all():
        x = np.arange(1.0, len(entries) + 1)
    return x, {key: values for key, values in found.items() if np.isfinite(values).any()}


def _unit(history: Any) -> str:
    first = history[0] if isinstance(history, list) and history else None
    return "step" if isinstance(first, Mapping) and "step" in first else "round"


def _number(value: Any) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if good else math.nan
    except OverflowError:  # an integer of a thousand digits is valid JSON
        return math.nan
    return number if math.isfinite(number) else math.nan


def mask_figure(masks: MaskSet) -> Figure | None:
    """Pictures of the first small layers: a row an output unit, a pixel a weight."""
    shapes = masks.shapes
    names = [
        name
        for name in masks
        if len(shapes[name]) > 1 and 0 < math.prod(shapes[name]) <= _PICTURE_WEIGHTS
    ][:_PICTURES]
    if not names:
        return None
    pictures = [masks[name].flatten(1).cpu().numpy() for name in names]  # [out, in * kernel]
    width, gap = 8.6, 0.3  # inches; the gap holds a title
    sizes = [_picture_size(p.shape[0], p.shape[1], width) for p in pictures]
    total = sum(height for _, height in sizes) + gap * len(names) + 0.05
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, total))
        colors = ListedColormap(["#808c9921", BLUE])
        top = total
        for name, picture, (wide, high) in zip(names, pictures, sizes, strict=True):
            top -= gap + high
            axes = figure.add_axes((0, top / total, wide / width, high / total))
            axes.imshow(picture, cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="none")
            share = f"{100 * picture.mean():.2f} % kept"
            axes.set_title(f"{_short(name)}   {shape_text(shapes[name])}   {share}", fontsize=8)
            axes.set_axis_off()
    return figure


def _picture_size(rows: int, columns: int, width: float) -> tuple[float, float]:
    """Inches for square pixels, within `width`; not so high that one layer fills the page."""
    height = min(1.2, 0.09 * rows, width * rows / columns)
    return max(0.1, height * columns / rows), max(0.05, height)


def comparison_figure(topologies: Mapping[str, Topology]) -> Figure:
    """Several methods on one network: density and effective nodes along the depth, and totals."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.2, 5.6), layout="constrained")
        grid = figure.add_gridspec(2, 4, height_ratios=(1.55, 1))
        density = figure.add_subplot(grid[0, :2])
        nodes = figure.add_subplot(grid[0, 2:])
        for index, (label, topology) in enumerate(topologies.items()):
            style: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "lw": 1.4, "marker": "o"}
            depth = np.arange(1, len(topology.layers) + 1)
            kept = np.array([layer.density for layer in topology.layers])
            alive = np.array([x.effective_nodes / max(x.nodes, 1) for x in topology.layers])
            shown = np.where(kept > 0, kept, np.nan)
            density.plot(depth, shown, ms=3, label=printable(label), **style)
            nodes.plot(depth, alive, ms=3, **style)
        density.set_yscale("log")
        density.yaxis.set_minor_locator(NullLocator())
        for axes, title in ((density, "density of each layer"), (nodes, "effective nodes")):
            axes.set_title(title)
            axes.set_xlabel("layer, in model order")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.margins(x=0.02)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            axes.grid(axis="y")
        nodes.set_ylim(-0.03, 1.05)
        density.legend(loc="best", ncols=2)
        for column, key in enumerate(_TOTALS):
            _bars(figure.add_subplot(grid[1, column]), topologies, key)
    return figure


def _bars(axes: Axes, topologies: Mapping[str, Topology], key: str) -> None:
    values = [float(getattr(topology, key)) for topology in topologies.values()]
    rows = np.arange(len(values))
    shown = [value if math.isfinite(value) else 0.0 for value in values]
    colors = [COLORS[index % len(COLORS)] for index in range(len(values))]
    axes.barh(rows, shown, height=0.62, color=colors, alpha=0.85)
    for row, (value, length) in enumerate(zip(values, shown, strict=True)):
        text = _total(value, key)
        axes.annotate(
            text, (length, row), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(rows, [printable(name) for name in topologies])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * max([*shown, 1e-9]))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(_LABELS[key], fontsize=9)


def _total(value: float, key: str) -> str:
    return log_text(value) if key == "log_paths" else f"{value:,.0f}"


def _short(name: str, longest: int = 44) -> str:
    """The end of a layer's name tells more than its middle."""
    text = printable(name)
    if len(text) <= longest:
        return text
    return f"{text[: longest // 3]}…{text[-(longest - longest // 3 - 1) :]}"
