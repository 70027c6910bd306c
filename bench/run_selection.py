"""Exact selection against everything else that finds the k-th largest, interleaved.

    python -m bench.run_selection                   the whole table, some 20 minutes on two cores
    python -m bench.run_selection --quick           a minute, into out/bench
    python -m bench.run_selection --sizes 1e7 --threads 2 --only grid --out out/bench
    python -m bench.run_selection --report-only     the page and the plot again, from the results

Writes selection.json into the folder of `--out`. With the default folder, bench/results, the page
is bench/selection.md and the plot docs/images/selection.png; otherwise both lie beside the file.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from bench import selection_contenders as who
from bench import selection_extras, selection_memory, selection_prune, selection_report
from bench.references import nth_element
from bench.selection_contenders import contenders_for, measure
from bench.selection_data import DISTRIBUTIONS, KEEPS, SEED, SIZES, kept_count, make_scores, rows_of
from bench.timing import RESULTS, Row, use_threads, write_results
from paikern.backends import cpu

ROOT = Path(__file__).parents[1]
QUICK_OUT = ROOT / "out" / "bench"
THREADS = (1, 2)
PARTS = ("grid", "extras", "memory")
KEEP = 0.1
SPARE = 2 << 30  # bytes of memory that a part must leave to the system


class Cell(NamedTuple):
    """One problem of the grid and who is timed on it besides paikern."""

    size: int
    distribution: str
    keep: float
    threads: int
    rivals: tuple[str, ...]


COMMON = (who.TOPK, who.KTHVALUE, who.PARTITION, who.NTH_ELEMENT, *who.FLOORS)
FEW = (who.PARTITION, *who.FLOORS)
WITHOUT_SORT = tuple(name for name in (*who.RIVALS, *who.FLOORS) if name != who.SORT)


def rivals(size: int, distribution: str, keep: float, most_threads: bool) -> tuple[str, ...]:
    """Who is timed beside paikern; nobody where the cell is left out.

    All are timed at 10 %; other fractions on the normal distribution and, at 10^7, on all of them.
    Above 10^7, where a sort takes half a minute, the other distributions meet np.partition alone;
    above 10^8 there is one distribution, without the contenders of torch.
    """
    usual, normal = keep == KEEP, distribution == "normal"
    if size <= 10**7:
        if usual:
            return (*WITHOUT_SORT, who.SORT) if most_threads or size < 10**7 else WITHOUT_SORT
        return COMMON if normal or (size == 10**7 and most_threads) else ()
    if size <= 10**8:
        if usual and normal:
            return (*WITHOUT_SORT, who.SORT) if most_threads else WITHOUT_SORT
        if usual:
            return FEW
        return (who.TOPK, who.KTHVALUE, *FEW) if normal and most_threads else ()
    return (who.PARTITION_IN_PLACE, who.NTH_ELEMENT, *FEW) if usual and normal else ()


def meets(size: int, distribution: str, name: str) -> bool:
    """torch.kthvalue takes quadratic time where scores descend: 15 s for 10^6 of them."""
    return not (name == who.KTHVALUE and distribution == "descending" and size > 10**5)


def grid(sizes: Sequence[int], threads: Sequence[int], names: Sequence[str]) -> Iterator[Cell]:
    """The cells of the grid, those of one tensor together."""
    for size in sizes:
        for name in names:
            for keep in KEEPS:
                for count in threads:
                    timed = rivals(size, name, keep, count == max(threads))
                    timed = tuple(rival for rival in timed if meets(size, name, rival))
                    if timed:
                        yield Cell(size, name, keep, count, timed)


def memory_available() -> int:
    """Bytes of memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def run_cells(cells: Sequence[Cell], spent: float, bar: tqdm[Any]) -> Iterator[Row]:
    """Time the cells of one tensor."""
    size, distribution = cells[0].size, cells[0].distribution
    scores = make_scores(distribution, size)
    for cell in cells:
        torch.set_num_threads(cell.threads)
        k = kept_count(size, cell.keep)
        pairs = measure(contenders_for(scores, k, cell.rivals), spent=spent)
        work = {
            "op": "topk_mask",
            "size": size,
            "distribution": distribution,
            "keep": cell.keep,
            "threads": cell.threads,
            "dtype": "float32",
            "layout": "contiguous",
        }
        yield from rows_of(work, pairs)
        bar.update()


def tools() -> dict[str, str]:
    """What the figures depend on besides what every results file says."""
    return {
        "numpy": np.__version__,
        "compiler": nth_element.compiler_version(),
        "instruction set": cpu.isa(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
    }


def save(folder: Path, rows: Sequence[Row], threads: int, more: dict[str, Any]) -> Path:
    """Write the results file, and what else belongs to this benchmark into it."""
    path = write_results("selection", rows, threads=threads, seeds=[SEED], folder=folder)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(json.loads(path.read_text()) | more, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run_selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, short, into out/bench")
    parser.add_argument(
        "--sizes", nargs="+", type=lambda text: int(float(text)), help="1e4 1e6 ..."
    )
    parser.add_argument("--threads", nargs="+", type=int, default=list(THREADS))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder of selection.json")
    parser.add_argument("--report-only", action="store_true", help="page and plot from the results")
    given = parser.parse_args(arguments)
    partial = given.quick or given.sizes is not None or len(given.only) < len(PARTS)
    given.out = given.out or (QUICK_OUT if partial and not given.report_only else RESULTS)
    given.sizes = given.sizes or (SIZES[:3] if given.quick else SIZES)
    return given


def fits(size: int) -> bool:
    """Whether three tensors of this size fit: the scores, and the copies of the others."""
    return 3 * 4 * size + SPARE < memory_available()


def run_grid(given: argparse.Namespace, rows: list[Row], save_rows: Callable[[], object]) -> None:
    names = ("normal", "levels", "equal") if given.quick else tuple(DISTRIBUTIONS)
    cells = list(grid([s for s in given.sizes if fits(s)], sorted(given.threads), names))
    with tqdm(total=len(cells), unit="cell") as bar:
        for (size, distribution), group in groupby(cells, lambda c: (c.size, c.distribution)):
            bar.set_description(f"{size:.0e} {distribution}")
            rows += run_cells(list(group), 0.05 if given.quick else who.SPENT, bar)
            save_rows()


def run_extras(given: argparse.Namespace, rows: list[Row]) -> None:
    extras = [
        (name, count, function)
        for name, function in selection_extras.EXTRAS.items()
        for count in sorted(given.threads)
    ]
    if given.quick:
        extras = extras[:2]
    elif fits(selection_extras.BEYOND_INT32 // 2):
        extras.append(("2^31 scores", max(given.threads), selection_extras.beyond_int32))
    with tqdm(extras, unit="group") as bar:
        for name, count, function in bar:
            bar.set_description(name)
            rows += function(count)
    if selection_prune.available() and not given.quick:
        print("global_unstructured ...")
        rows.append(selection_prune.compare(max(given.threads)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for, then write page and plot."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = parse(arguments)
    path = given.out / "selection.json"
    if not given.report_only:
        try:
            nth_element.library()
        except nth_element.CompilerMissingError as error:
            print(error, file=sys.stderr)
            return 2
        use_threads("bench.run_selection", max(given.threads), arguments)
        gc.freeze()  # what is loaded by now need not be searched after every round
        rows: list[Row] = []
        more: dict[str, Any] = {
            "tools": tools(),
            "left_out": [size for size in given.sizes if not fits(size)],
        }

        def save_rows() -> Path:
            return save(given.out, rows, max(given.threads), more)

        if "grid" in given.only:
            run_grid(given, rows, save_rows)
        if "extras" in given.only:
            run_extras(given, rows)
        if "memory" in given.only:
            more["memory"] = [
                usage._asdict() | {"ratio": usage.ratio} for usage in selection_memory.measure()
            ]
        print(save_rows())
    if given.out.resolve() == RESULTS.resolve():
        page, plot = ROOT / "bench/selection.md", ROOT / "docs/images/selection.png"
    else:
        page, plot = given.out / "selection.md", given.out / "selection.png"
    selection_report.write(path, page, plot)
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
