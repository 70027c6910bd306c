"""Two tables of the quality study in the columns of the papers that they follow."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.quality_ways import (
    ASNI_FORMS,
    DENSE,
    NETS,
    NO_DATA,
    WAYS,
    row_names,
    rows_of,
)
from bench.selection_report import table
from bench.timing import Row

SLIDES_COLUMNS = (
    "method", "accuracy %", "weight sp. %", "node sp. %", "pruning s", "training s", "step ms",
    "disk kB",
)  # fmt: skip
#: Methods without data that the slides' table has a place for.
WITHOUT_DATA = ("random_u", "magnitude")


def slides_table(rows: Sequence[Row], net: str, sparsity: float) -> list[str]:
    """Accuracy and cost in the columns of the EarlyCroP slides, structured methods first."""
    groups: dict[str, list[str]] = {"structured": [], "unstructured": []}
    for way_name, way in WAYS.items():
        if "," in way_name or (way.family == NO_DATA and way.method not in WITHOUT_DATA):
            continue
        kind = "structured" if way.structured else "unstructured"
        groups[kind] += rows_of(way_name)
    lines = [_slides_line(DENSE, [row for row in rows if row["method"] == DENSE])]
    for title, names in groups.items():
        found = [
            _slides_line(name, of_name)
            for name in names
            if (of_name := [r for r in rows if (r["method"], r["sparsity"]) == (name, sparsity)])
        ]
        lines += [[f"*{title}*", *("",) * (len(SLIDES_COLUMNS) - 1)], *found] if found else []
    if len([line for line in lines if line]) < 2 or not lines[0]:
        return []
    return [
        f"### {net}, {sparsity:.0%}, in the columns of the EarlyCroP slides", "",
        "The step is one of training, a batch of 100, one thread; of structured methods it is one "
        "of the smaller network. On disk masked weights are their kept values and one bit for each "
        "place. Memory of a GPU and CO2 are not measured.", "",
        *table(SLIDES_COLUMNS, lines),
    ]  # fmt: skip


def asni_table(rows: Sequence[Row], net: str) -> list[str]:
    """Dense (D), ASNI (A), its centroids (C) and its original initialisation (S)."""
    own, centroids, original = ASNI_FORMS
    lines = []
    dense = [row["accuracy"] for row in rows if row["method"] == DENSE]
    for sparsity in sorted({row["sparsity"] for row in rows if row["method"] in ASNI_FORMS}):
        at = [row for row in rows if row["sparsity"] == sparsity]
        kept = [row["kept"] for row in at if row["method"] == own]
        cells = [dense] + [
            [row["accuracy"] for row in at if row["method"] == name]
            for name in (own, centroids, original)
        ]
        lines.append(
            [
                f"{100 * sparsity:g}", f"{statistics.mean(kept):,.0f}" if kept else "",
                *(f"{percent(cell)} ± {spread(cell) or '-'}" if cell else "" for cell in cells),
            ]
        )  # fmt: skip
    if not lines:
        return []
    return [
        f"### {net}, ASNI", "",
        "D dense, A trained with ASNI, C trained again from the centroids, S from the weights it "
        "had first; table 2 of the paper has these columns.", "",
        *table(("sparsity %", "nonzeros", "D", "A", "C", "S"), lines),
    ]  # fmt: skip


def collapse_table(rows: Sequence[Row]) -> list[str]:
    """The lowest sparsity at which a method empties a layer, or leaves no path, by network."""
    nets = [net for net in NETS if any(row["model"] == net for row in rows)]
    lines = []
    for name in row_names():
        of_name = [row for row in rows if row["method"] == name and "empty_layers" in row]
        cells = [_collapse([row for row in of_name if row["model"] == net]) for net in nets]
        if any(cells):
            lines.append([name, *(cell or "-" for cell in cells)])
    if not lines:
        return []
    return [
        "## Where layers are emptied", "",
        "The lowest sparsity of the study at which, with one seed at least, a layer keeps no "
        "weight (the most layers at that sparsity) and at which no path is left. Methods that are "
        "not here did neither.", "",
        *table(("method", *nets), lines),
    ]  # fmt: skip


def _collapse(rows: Sequence[Row]) -> str:
    found = []
    empty = [row for row in rows if row["empty_layers"]]
    if empty:
        first = min(row["sparsity"] for row in empty)
        most = max(row["empty_layers"] for row in empty if row["sparsity"] == first)
        found.append(f"{first:.0%}: {most} layer{'s' if most > 1 else ''}")
    cut = [row["sparsity"] for row in rows if row["log_paths"] is None]
    if cut:
        found.append(f"{min(cut):.0%}: no path")
    return ", ".join(found)


def percent(accuracies: Sequence[float]) -> str:
    return f"{100 * statistics.mean(accuracies):.2f}"


def spread(accuracies: Sequence[float]) -> str:
    return f"{100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""


def _slides_line(name: str, rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []

    def mean(column: str, digits: int, scale: float = 1.0) -> str:
        found = [row[column] for row in rows if row.get(column) is not None]
        return f"{scale * statistics.mean(found):,.{digits}f}" if found else "-"

    removed = [100 * (1 - row["kept"] / row["total"]) for row in rows if "total" in row]
    return [
        name, mean("accuracy", 2, 100), f"{statistics.mean(removed):.1f}" if removed else "-",
        mean("node_sparsity", 1, 100), mean("seconds", 2), mean("train_seconds", 1),
        mean("step_ms", 1), mean("disk_bytes", 0, 1e-3),
    ]  # fmt: skip
