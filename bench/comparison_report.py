"""The page, the picture and the terminal table of the comparison, from its results file alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.comparison_plot import write_plot
from bench.comparison_rows import shown_ratio, step_seconds
from bench.selection_report import ratio_text, seconds_text, table
from bench.timing import Row

METHOD = """\
One call of `pk.prune(..., apply=False)` each, tracing and budgets included, against plain PyTorch
loops written from the papers and from how the published programs behave (`bench/references/`:
masked layers, autograd, a sort or kthvalue a round, HiGHS for the programs of NPB, one walk after
the other for PHEW). Each side has a process of its own, warmed up on a small network; they run in
turn, and each gets the median of its times (runs above ten seconds once). *Memory* is the peak
beyond the model. *> s* is a run that was stopped at its limit, with how far it came; its ratio is
then that of a step, or a lower bound, and there is none where paikern was stopped. *A step* is a
DPaI step or a round of SynFlow, everything before the first included. DPaI runs in variant
`published` for the steps given, SynFlow likewise for the rounds given; the published programs take
3,000 steps. The plain loops know linear layers and convolutions, not attention and embeddings: ViT
and GPT-2 have no reference.
"""

HEADER = (
    "method", "network", "sparsity", "paikern", "reference", "ratio", "a step", "its step",
    "memory", "its memory", "kept", "its kept", "log paths", "its log paths",
)  # fmt: skip


def write(results: Path, page_folder: Path, image_folder: Path) -> None:
    """Write `comparison.md` and `comparison.png` of a results file."""
    content = json.loads(results.read_text())
    image = image_folder / "comparison.png"
    for folder in (page_folder, image_folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_plot(content["rows"], image)
    text = page(content, os.path.relpath(image, page_folder))
    path = page_folder / "comparison.md"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def page(content: Mapping[str, Any], image: str) -> str:
    """The Markdown of a results file; `image` is the path of the picture."""
    rows: Sequence[Row] = content["rows"]
    lines = ["# Four methods, paikern against plain PyTorch", "", METHOD]
    machine, versions = content["machine"], content["versions"]
    lines += [
        f"{machine['cpu']}, {content['threads']} threads; torch {versions['torch']}, Python "
        f"{versions['python']}, paikern {versions['paikern']}; seed {content['seeds'][0]}.",
        "",
        f"![time against sparsity and size, memory, speed-up]({image})",
        "",
        *table(HEADER, [cells(row) for row in rows], left=2),
    ]
    losses = [
        row
        for row in rows
        if row["ratio"] is not None and row["ratio"] < 1 and row["reference_status"] == "finished"
    ]
    lines += ["", "## Where paikern loses", ""]
    lines += [
        f"- {row['method']}, {row['model']}, {row['sparsity']:.1%}: {ratio_text(row['ratio'])}"
        for row in losses
    ] or ["In no row that both sides finished."]
    failed = failures(rows)
    if failed:
        lines += ["", "## What did not run", "", *(f"- {text}" for text in failed)]
    return "\n".join(lines) + "\n"


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for each distinct failure."""
    found: dict[str, None] = {}
    for row in rows:
        for prefix, who in (("", "paikern"), ("reference_", "reference")):
            if row[f"{prefix}status"] == "failed":
                found[f"{who}, {row['method']}, {row['model']}: {row[f'{prefix}reason']}"] = None
    return list(found)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    method = row["method"]
    if row.get("effort"):
        method += f" ({row['effort']})"
    return [
        method,
        row["model"],
        f"{row['sparsity']:.1%}",
        _seconds(row, ""),
        _seconds(row, "reference_"),
        _ratio(row),
        _step(row, ""),
        _step(row, "reference_"),
        _bytes(row["peak_bytes"]),
        _bytes(row["reference_peak_bytes"]),
        _count(row["kept"]),
        _count(row["reference_kept"]),
        _log(row["log_paths"]),
        _log(row["reference_log_paths"]),
    ]


def terminal_table(rows: Sequence[Row], threads: int) -> Table:
    """The columns that fit on a terminal."""
    made = Table(title=f"Whole pruning runs, {threads} threads")
    for index, name in enumerate(HEADER[:6]):
        made.add_column(name, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(text.partition(" (")[0] for text in cells(row)[:6]))
    return made


def _seconds(row: Row, prefix: str) -> str:
    status, seconds = row[f"{prefix}status"], row[f"{prefix}seconds"]
    if status == "failed":
        return "failed"
    if status == "finished":
        return seconds_text(seconds)
    done, total = row[f"{prefix}done"], row[f"{prefix}total"]
    return f"> {seconds:g} s" + (f" ({done:,} of {total:,})" if total else "")


def _ratio(row: Row) -> str:
    shown = shown_ratio(row)
    if shown is None:
        return ""
    text, of = ratio_text(shown[0]), shown[1]
    return f"> {text}" if of == ">" else f"{text} {of}".rstrip()


def _step(row: Row, prefix: str) -> str:
    seconds = step_seconds(row, prefix)
    return "" if seconds is None else seconds_text(seconds)


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def _log(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
