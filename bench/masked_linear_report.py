"""The page and the picture of the packed-weight benchmark, from its results files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.masked_linear_plot import write_plot
from bench.selection_report import ratio_text, seconds_text, table
from bench.timing import Row

Results = Mapping[str, Any]

METHOD = """\
Every contender runs in turn with all others and each gets its fastest time; *dense* is the fastest
of three libraries on a weight masked beforehand: torch (MKL), oneDNN with the weight laid out for
it, numpy (OpenBLAS). A *ratio* is the time of dense over paikern's: above 1, packing is faster.
*CSR* is `torch.sparse_csr` with the same kept weights, *W * mask* masks a dense weight anew in
every call, as `torch.nn.utils.prune` and most published code do. Masks are uniformly random; all
values are random normal; float32. N is the number of rows of x.

*kernel* is what runs by itself: `index` goes over the kept weights, `decode` writes some rows of
the weight at a time and leaves the product to the library, `dense` means that `pk.sparsify` leaves
the layer as it is, so that nothing is lost (with `force=True` it is as slow as the row says).
"""

#: (step, sparsity, batch) -> least ratio at 4096 x 4096
TARGETS = {
    ("forward", 0.9, 1): 4.5,
    ("forward", 0.9, 32): 5,
    ("forward", 0.9, 256): 2,
    ("forward", 0.95, 1): 9,
    ("forward", 0.95, 32): 9,
    ("forward", 0.95, 256): 4,
    ("forward", 0.99, 1): 22,
    ("forward", 0.99, 32): 38,
    ("forward", 0.99, 256): 18,
    ("backward", 0.95, 256): 2.5,
}


def step_of(row: Row) -> str:
    return str(row["op"]).split()[-1]


def dispatched(row: Row) -> float:
    """The ratio of what `pk.sparsify` leaves in the model."""
    return 1.0 if row.get("kernel") == "dense" else float(row["ratio"])


def against(row: Row, name: str) -> float | None:
    other = row["all_seconds"].get(name)
    return None if other is None else float(other) / float(row["seconds"])


def cell_text(row: Row) -> str:
    return f"{row['size']}, {100 * row['sparsity']:g} %, N = {row['batch']}, {step_of(row)}"


def left(row: Row) -> float:
    """The same against the fastest library, also where torch's own product stays."""
    if row.get("kernel") != "dense":
        return float(row["ratio"])
    return float(row["reference_seconds"]) / float(row["all_seconds"]["mkl"])


def targets(results: Results, training: Results | None) -> list[str]:
    lines = []
    rows = results["rows"]
    at = {(step_of(r), r["sparsity"], r["batch"]): r for r in rows if r["size"] == "4096x4096"}
    for (step, sparsity, batch), least in TARGETS.items():
        row = at.get((step, sparsity, batch))
        what = f"4096x4096, {100 * sparsity:g} %, N = {batch}, {step}: against the best dense"
        lines.append(verdict(what, f"at least {least:g}x", row and row["ratio"], least))
    csr = [
        (ratio, row)
        for row in rows
        if row["batch"] >= 32 and (ratio := against(row, "csr")) is not None
    ]
    lowest = min(csr, key=lambda pair: pair[0], default=(None, None))
    lines.append(
        verdict("N >= 32: against torch CSR, worst cell", "at least 2x", lowest[0], 2, lowest[1])
    )
    for what, ratio, cells in (
        ("worst cell that it packs", dispatched, [r for r in rows if r.get("kernel") != "dense"]),
        ("worst cell, also of those it leaves to torch", left, rows),
    ):
        worst = min(cells, key=ratio, default=None)
        what = f"through the dispatcher, {what}: against the best of three dense libraries"
        lines.append(verdict(what, "at least 0.95x", worst and ratio(worst), 0.95, worst))
    for held in results.get("memory", []):
        if held["sparsity"] == 0.9:
            what = "weight, gradient, Adam's state and positions at 90 %, of dense"
            met = "met" if held["ratio"] <= 0.35 else "**missed**"
            lines.append([what, "at most 0.35x", f"{held['ratio']:.3f}x", met, ""])
    for row in training["rows"] if training else []:
        ways = row["ways"]
        ratio = ways["dense-masked"]["epoch_seconds"] / ways["packed"]["epoch_seconds"]
        what = f"training {row['model']} at 95 %, an epoch: against dense with masks"
        lines.append(verdict(what, "faster", ratio, 1.0))
    return table(["what", "target", "measured", "result", "where"], lines)


def verdict(
    what: str, target: str, value: float | None, least: float, where: Row | None = None
) -> list[str]:
    if value is None:
        return [what, target, "", "not measured", ""]
    met = "met" if value >= least else "**missed**"
    return [what, target, ratio_text(value), met, cell_text(where) if where else ""]


def grid(rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    grids: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grids.setdefault((row["size"], step_of(row)), []).append(row)
    for (size, step), cells in grids.items():
        body = []
        for row in cells:
            others = [against(row, name) for name in ("csr", "masked each call")]
            body.append(
                [
                    f"{100 * row['sparsity']:g} %",
                    str(row["batch"]),
                    seconds_text(row["seconds"]),
                    f"{seconds_text(row['reference_seconds'])} {row['reference']}",
                    ratio_text(row["ratio"]),
                    *("" if other is None else ratio_text(other) for other in others),
                    str(row.get("kernel", "")),
                ]
            )
        header = ["sparsity", "N", "paikern", "dense", "ratio", "CSR", "W * mask", "kernel"]
        lines += [f"### {size}, {step}", "", *table(header, body)]
    return lines


def losses(rows: Sequence[Row]) -> list[str]:
    lost = [row for row in rows if dispatched(row) < 1]
    left = sum(row.get("kernel") == "dense" for row in rows)
    said = f"In {left} of {len(rows)} cells the dispatcher leaves the layer dense."
    said += left_to_torch(rows)
    if not lost:
        return [f"{said} In no other cell is a dense library faster.", ""]
    body = [
        [cell_text(row), row["reference"], seconds_text(row["seconds"]),
         seconds_text(row["reference_seconds"]), ratio_text(row["ratio"])]
        for row in lost
    ]  # fmt: skip
    faster = table(["cell", "faster", "paikern", "dense", "ratio"], body, left=2)
    return [f"{said} In {len(lost)} a dense library is faster all the same:", "", *faster]


def left_to_torch(rows: Sequence[Row]) -> str:
    """What a layer that stays `nn.Linear` misses against the fastest library."""
    behind = [(left(row), row) for row in rows if row.get("kernel") == "dense"]
    slower = [pair for pair in behind if pair[0] < 0.95]
    if not slower:
        return ""
    worst, row = min(slower, key=lambda pair: pair[0])
    return (
        f" There it is torch's own product as before; in {len(slower)} of these cells another "
        f"library is more than 5 % faster than that, at worst {row['reference']} at "
        f"{cell_text(row)}: torch has {ratio_text(worst)} of its speed."
    )


def conv_table(results: Results | None) -> list[str]:
    if results is None:
        return ["Not measured in this run.", ""]
    body = [
        [
            row["size"],
            str(row["batch"]),
            f"{100 * row['sparsity']:g} %",
            step_of(row),
            seconds_text(row["seconds"]),
            f"{seconds_text(row['reference_seconds'])} {row['reference']}",
            ratio_text(row["ratio"]),
            str(row.get("kernel", "")),
        ]
        for row in results["rows"]
    ]
    header = ["out x in x kernel @ px", "N", "sparsity", "step", "paikern", "dense", "ratio"]
    packed = [row for row in results["rows"] if row.get("kernel") != "dense"]
    worst = min(packed, key=dispatched)
    said = (
        f"Against the faster of oneDNN's two layouts. In {len(results['rows']) - len(packed)} of "
        f"{len(results['rows'])} cells the layer stays dense; the worst cell that is packed is "
        f"{cell_text(worst)}: {ratio_text(worst['ratio'])}."
    )
    return [said, "", *table([*header, "kernel"], body)]


def training_table(results: Results | None) -> list[str]:
    if results is None:
        return ["Not measured in this run.", ""]
    body = []
    for row in results["rows"]:
        reference = row["ways"]["dense-masked"]
        for way, value in row["ways"].items():
            body.append(
                [
                    row["model"],
                    f"{way}, {row['packed_layers']} of {row['prunable_layers']} layers"
                    if way == "packed"
                    else way,
                    f"{100 * value['accuracy_mean']:.2f} ± {100 * value['accuracy_std']:.2f} %",
                    seconds_text(value["epoch_seconds"]),
                    ratio_text(reference["epoch_seconds"] / value["epoch_seconds"]),
                    f"{value['bytes'] / 1e6:.2f} MB",
                    ratio_text(reference["bytes"] / value["bytes"]),
                ]
            )
    header = ["network", "trained", "accuracy", "an epoch", "faster", "memory", "smaller"]
    return table(header, body, left=2)


def page_text(
    results: Results, conv: Results | None, training: Results | None, plot: str, source: str
) -> str:
    """The whole page; `plot` and `source` are the paths of picture and results as seen from it."""
    rows = results["rows"]
    machine, versions = results["machine"], results["versions"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"]
    parts += [f"{name} {value}" for name, value in versions.items()]
    parts += [f"{results['threads']} threads"]
    lines = [
        "# Packed weights, measured",
        "",
        f"Written by `python -m bench.run_masked_linear` from [masked_linear.json]({source}); "
        "`--report-only` writes it again.",
        "",
        "; ".join(parts) + ".",
        "",
        METHOD,
        "## Targets",
        "",
        *targets(results, training),
        "## Where packing wins",
        "",
        f"![Ratio to the best dense library over sparsity]({plot})",
        "",
        "## Losses",
        "",
        *losses(rows),
        "## Convolutions",
        "",
        *conv_table(conv),
        "## Training",
        "",
        *training_table(training),
        "## The grid",
        "",
        *grid(rows),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def read(path: Path) -> Results | None:
    found: Results | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def write(results: Path, page: Path, plot: Path) -> None:
    """Write page and picture; convolutions and training are read from the same folder."""
    linear = json.loads(results.read_text())
    folder = results.parent
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_plot(linear["rows"], plot)
    text = page_text(
        linear,
        read(folder / "masked_conv.json"),
        read(folder / "train_packed.json"),
        os.path.relpath(plot, page.parent),
        os.path.relpath(results, page.parent),
    )
    temporary = page.with_name(page.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, page)
