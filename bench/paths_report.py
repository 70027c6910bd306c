"""The page of the path benchmark, from its results file alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.paths_plot import write_plot
from bench.paths_process import LOOP, MILLION, OURS, Case
from bench.paths_profile_report import profile_lines
from bench.paths_results import part
from bench.paths_runs import FEW_ROUNDS
from bench.paths_runs import LOOP as LOOP_NAME
from bench.paths_scaling import FITTED, by_who, slope
from bench.paths_sweeps import ABS, COMPOSITION, FLOORS, PLAIN
from bench.selection_report import (
    Outcome,
    at_least,
    at_most,
    ratio_text,
    seconds_text,
    table,
    threads_text,
)
from bench.timing import Row

Results = Mapping[str, Any]

METHOD = """\
paikern and what it is compared with run in turn (a b, b a, ...) on the same threads, and each gets
the median of its times; a *ratio* is the other's median over paikern's, so that above 1 paikern is
faster. The loops are plain PyTorch, written from the papers and the behaviour of the published
programs (`bench/references/`): masked layers, autograd, a sort or kthvalue a round.
"""

SWEEPS = """\
Vectors in float32, a mask of packed bits for paikern and of floats for PyTorch. *x read* is
paikern's time over the faster of two reads of the same bytes in the same turn, a native one of 64
bytes a load and `torch.sum`: 1 would be the physical limit. *|W|* makes the magnitudes and
multiplies, *W* only multiplies (which is not the operation: no magnitude, no mask), *composition*
makes the magnitudes, the scores, their comparison with the threshold as a bool mask, its count, and
the adjoint.
"""

RUNS = f"""\
One call of `pk.prune(..., apply=False)` each, tracing included, in a process that has made such a
call before. Long runs are chaotic (a rounding flip at a threshold grows; the loop agrees with
itself in float64 on 85 to 100 % only), so the overlap of what both keep is told after
{FEW_ROUNDS} rounds, where it shows that both compute the same, and for the whole run with the
counts and the logarithm of the number of paths that are left. SynFlow's loop follows the rules of
variant `published`.

PX reads 100 images in one batch. Its network h does not depend on them; the loop runs it on a
batch of ones of the same size, as is common, or on one sample. In float32 the loop's scores
overflow on this network and it keeps nothing (its time does not depend on that); the overlap after
{FEW_ROUNDS} rounds is that with the loop in float64.
"""

MEMORY = """\
Peak memory of the process beyond the model while SynFlow runs, masks and all in between counted,
in multiples of the float32 weights; each case in a process of its own
(`python -m bench.paths_process`). The loop's own copy of the model is 1.00x of its figure. For
ResNet-50 at 224 pixels it runs in float64: in float32 its scores overflow and nothing is kept.
"""

SCALING = """\
A round of SynFlow on four square linear layers, to 10 % kept in six rounds (the loop: three); the
median of all rounds but the first. Memory is the peak beyond the model in the same process.
"""

SHORT = """\
**`path_forward` against |W|.** PyTorch reads W, writes |W| and reads it back: on this machine six
to eight times one read. No operation is faster than one read, so 12x is out of reach here; the
column *x read* says how far from it paikern is.

**SynFlow on ResNet-20.** The loop's round takes 10 to 11 ms where idle threads spin and 24.5 ms
under `OMP_WAIT_POLICY=passive`, which `make bench` sets; paikern's takes 2.0 ms either way, on
one thread or two. In a profile of one thread (perf, rounds 5 to 90) a third of it are
multiply-adds, a tenth the products of the scores, and the rest is laying out maps, maxima, norms
and additions of 66 operations of some 30 us each: too short to divide. 20 ms of a run are tracing
and set-up. A DPaI step on ResNet-20 is bound in the same way.

**SynFlow on VGG-16.** Two reads of 59 MB and 3 x 313 M multiply-adds are 8.5 ms at the rates
above; a dense round takes 15 to 16. On one thread a quarter of it is reading weights, a fifth the
layers over at most 16 positions, a quarter the tiles of the others, 6 % the filter of the
selection; on two the second waits for 15 % of the time, for the candidates, pools and maps that
one thread does. From a density of .2 on thin layers are read from lists, and a round falls to 6.5
ms.

**PX.** With the masks of a run the average round is .41 of the multiply-adds of a dense one for f
and, where columns common to four channels are added once, .16 for g. On two threads f and g take
85 % of a round, the sweeps of h and the selection 7 %, listing what is kept 3 %. In a profile of
one thread (perf) the last rounds, at a tenth of the multiply-adds, still spend 85 % of the kernel
of f and 64 % of that of g in the loops that multiply and add. At densities of .4 to .7 g costs as
much as f. The other loop, which runs h on one sample, is not published code but its obvious repair.

**Memory.** 7 MB are modules that the first trace loads, whatever the model. Of the weights, masks
take .06x, lists of thin layers up to .09x, candidates of a selection up to .09x. The maps of all
layers stay until the scores are selected: nothing for linear layers, more than the weights at 224
pixels.
"""


def weights_text(count: int) -> str:
    """
    >>> weights_text(1 << 20), weights_text(8_387_584), weights_text(1 << 30)
    ('1.0 M', '8.4 M', '1.07 G')
    """
    return f"{count / 1e9:.2f} G" if count >= 10**9 else f"{count / 1e6:.1f} M"


def bytes_text(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def rows_in(results: Results, *sections: str) -> list[Row]:
    return [row for row in results["rows"] if row["section"] in sections]


def over_read(rows: Iterable[Row]) -> float | None:
    """paikern's time in units of the faster read."""
    return max((1 / row["ratio"] for row in rows if row["reference"] in FLOORS), default=None)


def against(rows: Iterable[Row], name: str) -> float | None:
    return next((row["ratio"] for row in rows if row["reference"] == name), None)


def problem(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("op", "size", "dtype", "sparsity", "threads"))


def outcomes(results: Results) -> list[Outcome]:
    """What was promised, and what this run measured."""
    found: list[Outcome] = []
    sweeps = [
        row
        for row in rows_in(results, "sweeps")
        if row["dtype"] == "float32" and not row["sparsity"]
    ]
    for op, most, name, least in (
        ("path_forward", 1.1, ABS, 12),
        ("path_sweep", 2.0, COMPOSITION, 25),
    ):
        mine = [row for row in sweeps if row["op"] == op]
        for threads in sorted({row["threads"] for row in mine}) or [results["threads"]]:
            here = [row for row in mine if row["threads"] == threads]
            what = f"`{op}`, float32, {threads_text(threads)}"
            found += [
                at_most(f"{what}: over a read", most, over_read(here), ratio_text),
                at_least(f"{what}: against {name}", least, against(here, name)),
            ]
    for section, method, model, limit in (
        ("runs", "synflow", "vgg16_bn", 25),
        ("runs", "synflow", "resnet20", 10),
        ("dpai", "dpai", "vgg19_bn", 40),
        ("dpai", "dpai", "resnet20", 20),
        ("dpai", "dpai", "resnet50", 15),
        ("px", "px", "resnet20", 10),
    ):
        held = [
            row
            for row in rows_in(results, section)
            if row["model"] == model and row.get("reference", LOOP_NAME) == LOOP_NAME
        ]
        slowest = min(held, key=lambda row: row["ratio"], default=None)
        where = f"variant {slowest['variant']}" if slowest else ""
        unit = "a step" if method == "dpai" else "whole run"
        what = f"{method}, {model}, {unit}"
        found.append(at_least(what, limit, slowest["ratio"] if slowest else None, where))
    found += memory_outcomes(results)
    points = by_who(part(results, "scaling", "usages"), "round_seconds").get(OURS, [])
    reached = max((weights for weights, _ in points), default=0.0) >= FITTED[1] * MILLION * 0.99
    exponent = slope(points) if reached else None
    what = "growth of a round's time from 8 M to 512 M weights: exponent"
    return [*found, at_most(what, 1.05, exponent, lambda value: f"{value:.3f}")]


def memory_outcomes(results: Results) -> list[Outcome]:
    held = [u for u in part(results, "memory", "usages") if Case.parse(u["name"]).who == OURS]
    what = "memory of SynFlow beyond the model, over its weights"
    if not held:
        return [at_most(what, 0.2, None, ratio_text)]
    return [
        at_most(f"{what}: {Case.parse(u['name']).model}", 0.2, u["ratio"], ratio_text) for u in held
    ]


def targets(results: Results) -> list[str]:
    lines = []
    for outcome in outcomes(results):
        measured, verdict = "", "not measured"
        if outcome.value is not None:
            measured = outcome.text(outcome.value)
            verdict = "met" if outcome.passed else "**missed**"
        what = outcome.what.replace("|", "\\|")  # a bar would end the cell
        lines.append([what, outcome.target, measured, verdict, outcome.where])
    return table(["what", "target", "measured", "result", "where"], lines)


def optional(text: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else text(value)


def sweep_lines(results: Results) -> list[str]:
    body = []
    for _, group in groupby(rows_in(results, "sweeps"), problem):
        rows = list(group)
        row = rows[0]
        seconds = sorted(r["seconds"] for r in rows)[len(rows) // 2]
        ratios = [optional(ratio_text, against(rows, name)) for name in (ABS, PLAIN, COMPOSITION)]
        body.append(
            [
                f"`{row['op']}`",
                row["size"],
                row["dtype"],
                f"{row['sparsity']:.0%}",
                str(row["threads"]),
                seconds_text(seconds),
                f"{row['bytes'] / seconds / 1e9:.1f} GB/s",
                optional(ratio_text, over_read(rows)),
                *ratios,
            ]
        )
    header = ["operation", "weight", "dtype", "masked", "threads", "paikern", "rate", "x read"]
    return table([*header, "\\|W\\|", "W", "composition"], body, left=3)


def run_lines(results: Results) -> list[str]:
    body = [
        [
            f"{row['method']}, {row['variant']}",
            row["model"],
            row["reference"],
            str(row["rounds"]),
            seconds_text(row["seconds"]),
            seconds_text(row["reference_seconds"]),
            ratio_text(row["ratio"]),
            f"{row['kept']:,} / {row['reference_kept']:,}",
            f"{row[f'overlap_{FEW_ROUNDS}_rounds']:.3%}",
            f"{row['overlap']:.2%}" if row["reference_kept"] else "none",
            " / ".join(paths_text(row[key]) for key in ("log_paths", "reference_log_paths")),
        ]
        for row in rows_in(results, "runs", "px")
    ]
    header = ["method", "model", "against", "rounds", "paikern", "loop", "ratio", "kept, both"]
    header += [f"overlap after {FEW_ROUNDS}", "at the end", "log paths, both"]
    return table(header, body, left=3)


def paths_text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def dpai_lines(results: Results) -> list[str]:
    body = [
        [
            row["model"],
            row["variant"],
            seconds_text(row["seconds"]),
            seconds_text(row["reference_seconds"]),
            ratio_text(row["ratio"]),
            f"{row['mask_agreement']:.4%} after {row['steps']}",
        ]
        for row in rows_in(results, "dpai")
    ]
    return table(["model", "variant", "paikern", "loop", "ratio", "same mask, steps"], body, left=2)


def usage_lines(usages: Sequence[Row], times: bool) -> list[str]:
    """A line for each model: paikern, the loop, and where both were measured their ratio."""
    held: dict[str, dict[str, Row]] = {}
    for usage in usages:
        case = Case.parse(usage["name"])
        held.setdefault(case.model, {})[case.who] = usage
    body = []
    for model, both in held.items():
        ours, loop = both.get(OURS), both.get(LOOP)
        any_of = next(iter(both.values()))
        cells = [model, weights_text(any_of["weights"])]
        if times:
            cells += [seconds_text(u["round_seconds"]) if u else "" for u in (ours, loop)]
            ratio = loop["round_seconds"] / ours["round_seconds"] if ours and loop else None
            cells.append(optional(ratio_text, ratio))
        cells += [
            f"{bytes_text(u['extra_bytes'])}, {ratio_text(u['ratio'])}" if u else ""
            for u in (ours, loop)
        ]
        body.append(cells)
    header = ["model", "weights"] + (["round", "of the loop", "ratio"] if times else [])
    return table([*header, "memory", "of the loop"], body)


def scaling_lines(results: Results, plot: str) -> list[str]:
    usages = part(results, "scaling", "usages")
    lines = [f"![Time and memory of a round over the number of weights]({plot})", ""]
    for who, points in by_who(usages, "round_seconds").items():
        exponent = slope(points)
        if exponent is not None:
            lines.append(f"- {who}: time grows with weights to the power of {exponent:.3f}")
    return [*lines, "", *usage_lines(usages, times=True)]


def heading(results: Results, source: str) -> list[str]:
    machine, versions = results["machine"], results["versions"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"]
    parts += [f"{name} {value}" for name, value in versions.items()]
    parts += [f"{name}: {value}" for name, value in results.get("tools", {}).items()]
    parts.append(threads_text(results["threads"]))
    lines = [
        "# The path engine, measured",
        "",
        f"Written by `python -m bench.run_paths` from [paths.json]({source}); "
        "`--report-only` writes it again.",
        "",
        "; ".join(parts) + ".",
        "",
    ]
    peaks = part(results, "profile", "peaks")
    if peaks:
        lines += [
            f"Measured in the same run, {threads_text(peaks['threads'])}: a copy moves "
            f"{peaks['copy'] / 1e9:.1f} GB/s (read and written), a read {peaks['read'] / 1e9:.1f} "
            f"GB/s, and {peaks['multiply_adds'] / 1e9:.0f} G float32 multiply-adds a second are "
            "the peak.",
            "",
        ]
    return [*lines, METHOD]


def page_text(results: Results, plot: str, source: str) -> str:
    """The whole page; `plot` and `source` are the paths of picture and results as seen from it."""
    left_out = [name for held in ("memory", "scaling") for name in part(results, held, "left_out")]
    missing = [f"Left out for want of memory or time: {', '.join(left_out)}.", ""]
    parts: list[tuple[str, str, list[str]]] = [
        ("Targets", "", targets(results)),
        ("Why some are missed", SHORT, []),
        ("Sweeps of one layer", SWEEPS, sweep_lines(results)),
        ("Whole runs", RUNS, run_lines(results)),
        ("A DPaI step", "98 % sparsity, every layer by its ERK quota.\n", dpai_lines(results)),
        ("Memory", MEMORY, usage_lines(part(results, "memory", "usages"), times=False)),
        ("Growth", SCALING, [*scaling_lines(results, plot), *(missing if left_out else [])]),
        ("Where a DPaI step spends its time", "", profile_lines(results)),
        ("Sections of this file", "", section_lines(results)),
    ]
    lines = heading(results, source)
    for title, text, body in parts:
        lines += [f"## {title}", "", *([text] if text else []), *body]
    return "\n".join(lines).rstrip() + "\n"


def section_lines(results: Results) -> list[str]:
    body = [
        [name, about["measured"], f"{about['duration']:.0f} s"]
        for name, about in results.get("sections", {}).items()
    ]
    return table(["section", "measured", "took"], body)


def write(source: Path, page: Path, plot: Path) -> None:
    """Write the plot of a results file, and the page that shows it."""
    results = json.loads(source.read_text())
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_plot(part(results, "scaling", "usages"), plot)
    seen = [os.path.relpath(path, page.parent) for path in (plot, source)]
    page.write_text(page_text(results, *seen))
