"""The page and the plot of the selection benchmark, from its results file alone."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from bench import selection_contenders as who
from bench.selection_data import BEYOND_INT32, DISTRIBUTIONS
from bench.selection_plot import write_plot
from bench.timing import Row

Results = Mapping[str, Any]

METHOD = """\
paikern and one contender at a time run in turn (a b, b a, ...) after a round that warms up, and
each gets the median of its times; a *ratio* is the contender's median over paikern's of the same
turn. Below 2 ms a sample is the mean of a loop of calls, above 0.5 s there are three samples,
above 4 s there is one. paikern's time is that of `paikern.ops.topk_mask(scores, k)`, which finds
the threshold **and** writes the exact bit mask; the others find the threshold only (`torch.topk`
and `torch.sort` also order and indices).

They run in pairs because memory that one frees slows down the next one that allocates, which would
flatter paikern: `np.partition` of 10^8 takes 0.24 s after itself, 0.4 to 1.1 s after `torch.topk`.
"""

NOTES = """\
- `np.partition` copies the array and reorders the copy; `ndarray.partition` and `std::nth_element`
  work in place, and the copy they are given is made outside the clock. All three have one thread,
  whatever the column *threads* says.
- `torch.topk(sorted=False)` leaves the k scores unsorted. `torch.kthvalue` has one thread; where
  scores descend it takes quadratic time and is left out above 10^5.
- *read* reads the same memory once, 64 bytes a load, on as many threads (below 16 MB on one;
  `bench/references/nth_element.cpp`); `torch.sum` is torch's own read. *x read* is paikern's time
  over the faster of the two: 1 would be the physical limit.
- `torch.sort` above 10^6 runs at 10 % and the highest number of threads. At 10^8 only the normal
  distribution meets torch (a sort takes half a minute there), and 10^9 meets NumPy and the standard
  library only.
- The scores lie in memory of torch's allocator, in pages of the size the system gives it.
"""


def seconds_text(seconds: float) -> str:
    """Three digits and a unit.

    >>> [seconds_text(s) for s in (0.0000123, 0.0456, 7.5)]
    ['12.3 us', '45.6 ms', '7.50 s']
    """
    for unit, scale in (("us", 1e6), ("ms", 1e3), ("s", 1.0)):
        value = seconds * scale
        if value < 1000 or unit == "s":
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def ratio_text(ratio: float) -> str:
    """
    >>> [ratio_text(r) for r in (0.0123, 0.123, 1.5, 34.56, 123.4)]
    ['0.012x', '0.12x', '1.50x', '34.6x', '123x']
    """
    digits = 3 if ratio < 0.095 else 2 if ratio < 9.95 else 1 if ratio < 99.5 else 0
    return f"{ratio:.{digits}f}x"


def size_text(size: int) -> str:
    """
    >>> size_text(10_000_000), size_text(270_896), size_text(2**31 + 1024)
    ('10^7', '270,896', '2^31 + 1024')
    """
    if size == BEYOND_INT32:
        return "2^31 + 1024"
    digits = str(size)
    return f"10^{len(digits) - 1}" if digits.strip("0") == "1" else f"{size:,}"


def keep_text(keep: float) -> str:
    return f"{100 * keep:.3g} %"


def threads_text(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table whose first `left` columns are aligned left."""
    marks = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(cells)} |" for cells in (header, marks, *lines)] + [""]


class Cell(NamedTuple):
    """The rows of one problem, by contender; `about` is what they share."""

    about: Row
    rows: dict[str, Row]

    def ratio(self, name: str) -> float | None:
        return self.rows[name]["ratio"] if name in self.rows else None

    @property
    def seconds(self) -> float:
        """paikern's time: the median over its turns with the others."""
        return statistics.median(row["seconds"] for row in self.rows.values())

    @property
    def floors(self) -> float | None:
        """paikern's time in units of the fastest read."""
        reads = [1 / self.rows[name]["ratio"] for name in who.FLOORS if name in self.rows]
        return max(reads) if reads else None


KEY = ("op", "size", "distribution", "keep", "threads", "dtype", "layout")


def cells_of(rows: Sequence[Row]) -> list[Cell]:
    """Rows of one problem belong together; the order of the file stays."""
    groups = groupby(rows, lambda r: tuple(r[name] for name in KEY))
    held = [list(group) for _, group in groups]
    return [Cell(group[0], {r["reference"]: r for r in group}) for group in held]


def find(cells: Sequence[Cell], **wanted: Any) -> list[Cell]:
    return [c for c in cells if all(c.about.get(name) == v for name, v in wanted.items())]


class Outcome(NamedTuple):
    """One line of the table of targets. Without a value it was not measured in this run."""

    what: str
    target: str
    value: Any
    passed: bool
    text: Callable[[Any], str]
    where: str = ""


def at_least(what: str, limit: float, value: float | None, where: str = "") -> Outcome:
    met = value is not None and value >= limit
    return Outcome(what, f"at least {limit:g}x", value, met, ratio_text, where)


def at_most(
    what: str, limit: float, value: float | None, text: Callable[[float], str], where: str = ""
) -> Outcome:
    return Outcome(
        what, f"at most {text(limit)}", value, value is not None and value <= limit, text, where
    )


def outcomes(results: Results) -> list[Outcome]:
    """What was promised, and what this run measured."""
    cells = cells_of(results["rows"])
    usual = {"op": "topk_mask", "distribution": "normal", "keep": 0.1, "dtype": "float32",
             "layout": "contiguous"}  # fmt: skip
    counts = sorted({c.about["threads"] for c in cells})
    found = []

    def only(threads: int, size: int) -> Cell | None:
        return next(iter(find(cells, size=size, threads=threads, **usual)), None)

    for threads in counts:
        cell = only(threads, 10**8)
        label = f"10^8 fp32, 10 %, {threads_text(threads)}"
        for name, limit in (
            (who.KTHVALUE, 40),
            (who.TOPK, 45),
            (who.PARTITION, 4 if threads == 1 else 6),
        ):
            ratio = cell.ratio(name) if cell else None
            found.append(at_least(f"{label}: against {name}", limit, ratio))
        floor = cell.floors if cell else None
        found.append(at_most(f"{label}: over reading the data", 2.5, floor, ratio_text))
    for size, limit in ((10**7, 30), (10**6, 15)):
        for threads in counts:
            cell = only(threads, size)
            label = f"{size_text(size)} fp32, 10 %, {threads_text(threads)}"
            ratio = cell.ratio(who.KTHVALUE) if cell else None
            found.append(at_least(f"{label}: against {who.KTHVALUE}", limit, ratio))
    for layout in ("a k each", "one k over all"):
        slowest = max(find(cells, layout=layout), key=lambda c: c.seconds, default=None)
        found.append(
            at_most(
                f"the layers of a ResNet-20, {layout}",
                150e-6,
                slowest.seconds if slowest else None,
                seconds_text,
                describe(slowest) if slowest else "",
            )
        )
    found += worst_distributions(cells)
    found += [*pruning(cells), *memory(results), beyond(cells)]
    return found


def worst_distributions(cells: Sequence[Cell]) -> list[Outcome]:
    """For each size, the cell in which np.partition comes closest."""
    against = [(c.rows[who.PARTITION]["ratio"], c) for c in cells if who.PARTITION in c.rows]
    found = []
    for size in sorted({c.about["size"] for _, c in against}):
        ratio, cell = min((p for p in against if p[1].about["size"] == size), key=lambda p: p[0])
        what = f"worst cell of {size_text(size)}: against {who.PARTITION}"
        found.append(at_least(what, 1, ratio, describe(cell)))
    return found or [at_least(f"worst cell: against {who.PARTITION}", 1, None)]


def describe(cell: Cell) -> str:
    about = cell.about
    extra = [about["layout"]] if about["layout"] != "contiguous" else []
    extra += [about["op"]] if about["op"] != "topk_mask" else []
    types = [about["dtype"]] if about["dtype"] != "float32" else []
    words = [size_text(about["size"]), about["distribution"], keep_text(about["keep"]),
             f"{about['threads']}T", *types, *extra]  # fmt: skip
    return ", ".join(words)


def pruning(cells: Sequence[Cell]) -> list[Outcome]:
    rows = [row for c in find(cells, op="global_unstructured") for row in c.rows.values()]
    ratio, extra, theirs = (
        (rows[0]["ratio"], rows[0]["extra_memory"], rows[0]["reference_extra_memory"])
        if rows
        else (None, None, None)
    )
    what = "global_unstructured, 10^8 weights in 200 layers"
    note = f"torch: {ratio_text(theirs)}" if theirs is not None else ""
    counts = [f"{rows[0]['kept']:,} and {rows[0]['reference_kept']:,} kept"] if rows else []
    return [
        at_least(f"{what}: against torch.nn.utils.prune", 50, ratio, *counts),
        at_most(f"{what}: extra memory over the weights", 0.1, extra, ratio_text, note),
    ]


def memory(results: Results) -> list[Outcome]:
    what = "extra memory of topk_mask over the scores, mask included"
    usages = results.get("memory", [])
    if not usages:
        return [at_most(what, 0.25, None, ratio_text)]
    worst = max(usages, key=lambda usage: usage["ratio"])
    return [at_most(what, 0.25, worst["ratio"], ratio_text, worst["name"])]


def beyond(cells: Sequence[Cell]) -> Outcome:
    what = f"{size_text(BEYOND_INT32)} scores"
    found = find(cells, size=BEYOND_INT32)
    if not found:
        return Outcome(what, "exact", None, False, str)
    kept, wanted = found[0].about["kept"], found[0].about["wanted"]
    return Outcome(
        what, "exact", kept, kept == wanted, lambda n: f"{n:,} kept", f"{wanted:,} wanted"
    )


def targets(results: Results) -> list[str]:
    lines = []
    for outcome in outcomes(results):
        measured, verdict = "", "not measured"
        if outcome.value is not None:
            measured = outcome.text(outcome.value)
            verdict = "met" if outcome.passed else "**missed**"
        lines.append([outcome.what, outcome.target, measured, verdict, outcome.where])
    return table(["what", "target", "measured", "result", "where"], lines)


GRID_COLUMNS = {
    who.TOPK: "topk",
    who.TOPK_UNSORTED: "topk, unsorted",
    who.KTHVALUE: "kthvalue",
    who.SORT: "sort",
    who.PARTITION: "np.partition",
    who.PARTITION_IN_PLACE: "in place",
    who.NTH_ELEMENT: "nth_element",
}


def is_grid(cell: Cell) -> bool:
    about = cell.about
    return (
        about["op"] == "topk_mask"
        and about["distribution"] in DISTRIBUTIONS
        and about["dtype"] == "float32"
        and about["layout"] == "contiguous"
    )


def grid_tables(cells: Sequence[Cell]) -> list[str]:
    """A table for each size: paikern's time, its distance to the read, the ratios."""
    lines = []
    for size in sorted({c.about["size"] for c in cells}):
        here = [c for c in cells if c.about["size"] == size]
        used = [name for name in GRID_COLUMNS if any(name in c.rows for c in here)]
        body = []
        for cell in here:
            ratios = [cell.ratio(name) for name in used]
            body.append(
                [
                    cell.about["distribution"],
                    keep_text(cell.about["keep"]),
                    str(cell.about["threads"]),
                    seconds_text(cell.seconds),
                    ratio_text(cell.floors) if cell.floors else "",
                    *("" if ratio is None else ratio_text(ratio) for ratio in ratios),
                ]
            )
        header = ["distribution", "keep", "threads", "paikern", "x read"]
        header += [GRID_COLUMNS[name] for name in used]
        lines += [f"### {size_text(size)} scores", "", *table(header, body)]
    return lines


def other_tables(cells: Sequence[Cell]) -> list[str]:
    body = []
    for cell in cells:
        about = cell.about
        for name, row in cell.rows.items():
            body.append(
                [
                    f"`{about['op']}`",
                    size_text(about["size"]),
                    ", ".join(
                        [about["distribution"], about["dtype"]]
                        + ([about["layout"]] if about["layout"] != "contiguous" else [])
                    ),
                    str(about["threads"]),
                    name,
                    seconds_text(row["seconds"]),
                    seconds_text(row["reference_seconds"]),
                    ratio_text(row["ratio"]),
                ]
            )
    header = ["operation", "size", "scores", "threads", "against", "paikern", "the other", "ratio"]
    return table(header, body, left=3)


def losses(cells: Sequence[Cell]) -> list[str]:
    """Every cell in which somebody who finds the threshold was faster."""
    lost = [
        [describe(cell), name, seconds_text(row["seconds"]), seconds_text(row["reference_seconds"]),
         ratio_text(row["ratio"])]
        for cell in cells
        for name, row in cell.rows.items()
        if name not in who.FLOORS and row["ratio"] < 1
    ]  # fmt: skip
    if not lost:
        return ["None: paikern was the fastest in every cell of this run.", ""]
    return table(["cell", "faster", "paikern", "the other", "ratio"], lost, left=2)


def memory_table(results: Results) -> list[str]:
    usages = results.get("memory", [])
    if not usages:
        return ["Not measured in this run.", ""]
    body = [
        [u["name"], f"{u['score_bytes'] / 1e6:.0f} MB", f"{u['extra_bytes'] / 1e6:.1f} MB",
         f"{u['ratio']:.3f}x"]
        for u in usages
    ]  # fmt: skip
    return table(["case", "scores", "extra", "ratio"], body)


def page_text(results: Results, plot: str, source: str) -> str:
    """The whole page; `plot` and `source` are the paths of picture and results as seen from it."""
    cells = cells_of(results["rows"])
    grid = [c for c in cells if is_grid(c)]
    machine, versions = results["machine"], results["versions"]
    parts = [f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"]
    parts += [f"{name} {value}" for name, value in versions.items()]
    parts += [f"{name}: {value}" for name, value in results.get("tools", {}).items()]
    left_out = [size_text(size) for size in results.get("left_out", [])]
    lines = [
        "# Exact selection, measured",
        "",
        f"Written by `python -m bench.run_selection` from [selection.json]({source}); "
        "`--report-only` writes it again.",
        "",
        "; ".join(parts) + ".",
        "",
        METHOD,
        "## Targets",
        "",
        *targets(results),
        "## Time and distributions",
        "",
        f"![Time over size, and ratios for each distribution]({plot})",
        "",
        *(f"- *{name}*: {kind.text}" for name, kind in DISTRIBUTIONS.items()),
        "",
        NOTES,
        *([f"Left out for want of memory: {', '.join(left_out)}.", ""] if left_out else []),
        "## Losses",
        "",
        *losses(cells),
        "## The grid",
        "",
        "Ratios are the contender's time over paikern's: above 1, paikern is faster.",
        "",
        *grid_tables(grid),
        "## Layers, types, strides, factored scores",
        "",
        *other_tables([c for c in cells if not is_grid(c)]),
        "## Memory",
        "",
        "Peak memory beyond the scores (factored: beyond the weights), the mask included, each in",
        "a process of its own, two threads (`python -m bench.selection_memory`).",
        "",
        *memory_table(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write(source: Path, page: Path, plot: Path) -> None:
    """Write the plot of a results file, and the page that shows it."""
    results = json.loads(source.read_text())
    cells = [cell for cell in cells_of(results["rows"]) if is_grid(cell)]
    plot.parent.mkdir(parents=True, exist_ok=True)
    write_plot([row for cell in cells for row in cell.rows.values()], plot)
    seen = [os.path.relpath(path, page.parent) for path in (plot, source)]
    page.write_text(page_text(results, *seen))
