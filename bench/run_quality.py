"""What masks are worth: paths, nodes and kernels, and the accuracy after training, of every method.

    python -m bench.run_quality --jobs 2        everything; an hour and a quarter on two cores
    python -m bench.run_quality --nets lenet300 --ways dpai npb --sparsity 0.98 --epochs 1 --out out

Three networks, four sparsities, three seeds, 5,000 MNIST images. Rows are written as they come and
kept: a run that was stopped goes on where it was. Rows of another machine, other versions or other
settings of the network or the method are made anew, and so are those of methods that had refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import quality_report
from bench.options import count, fraction
from bench.quality_runs import counted_row, quality_rows, sweep_row
from bench.quality_ways import (
    COUNTED,
    COUNTED_WAYS,
    DENSE,
    NETS,
    SEEDS,
    SPARSITIES,
    SWEEP,
    WAYS,
    fits,
    way_of,
)
from bench.timing import RESULTS, Row, machine, versions, write_results

ROOT = Path(__file__).parents[1]
Task = tuple[str, str, float, int, int | None]


def tasks_of(given: argparse.Namespace) -> list[Task]:
    """Everything that is asked for; the sweep is a task of a network "sweep"."""
    found: list[Task] = []
    for seed in given.seeds:
        for net in given.nets:
            found.append((net, DENSE, 0.0, seed, given.epochs))
            found += [
                (net, way, sparsity, seed, given.epochs)
                for sparsity in given.sparsity
                for way in given.ways
                if fits(net, way) and WAYS[way].at(sparsity)
            ]
    if not given.no_sweep:
        found += [("sweep", label, 0.0, 0, None) for label in SWEEP]
    if not given.no_counts:
        found += [
            (net, way, sparsity, 0, None)
            for net, sparsities in COUNTED.items()
            for sparsity in sparsities
            for way in COUNTED_WAYS
            if way in given.ways
        ]
    return found


def carry_out(task: Task) -> list[Row]:
    """The rows of one run, in a process of one thread."""
    net, way, sparsity, seed, epochs = task
    if net == "sweep":
        return [sweep_row(way)]
    if net in COUNTED:
        return [counted_row(net, way, sparsity)]
    return quality_rows(net, way, sparsity, seed, epochs)


def attempt(task: Task) -> tuple[list[Row], str]:
    """The rows of one run, or why there are none: a mistake in one must not end the others."""
    try:
        return carry_out(task), ""
    except Exception:
        return [], f"{task}: {traceback.format_exc()}"


def tell(mistakes: Sequence[str]) -> int:
    """Print what went wrong; the exit code."""
    for text in mistakes:
        print(f"bench.run_quality: {text}", file=sys.stderr)
    return 1 if mistakes else 0


def identity(row: Row) -> tuple[Any, ...]:
    if row.get("op") == "sweep":
        return ("sweep", row["size"], 0.0, 0)
    return (row["model"], row["method"], row["sparsity"], row["seed"])


def settings_of_nets() -> dict[str, Any]:
    """How each network is made and trained, as a results file says it."""
    return {name: json.loads(json.dumps(net._asdict())) for name, net in NETS.items()}


def earlier(path: Path, epochs: int | None) -> list[Row]:
    """The rows of an earlier run that still hold."""
    if not path.exists():
        return []
    held = json.loads(path.read_text())
    rows: list[Row] = held["rows"]
    fine = []
    if (held["machine"], held["versions"], held.get("epochs")) == (machine(), versions(), epochs):
        then, now = held.get("nets", {}), settings_of_nets()
        same = {net for net in now if then.get(net) == now[net]} | set(COUNTED)
        fine = [row for row in rows if row["model"] in same and _holds(row)]
    if len(fine) < len(rows):
        print(
            f"bench.run_quality: {len(rows) - len(fine)} of {len(rows)} rows in {path} were made "
            "with other settings or refused; they are made anew where they are asked for",
            file=sys.stderr,
        )
    return fine


def _holds(row: Row) -> bool:
    """Whether a row is of what its method is now."""
    if "error" in row:
        return False
    if row.get("op") == "sweep" or row["method"] == DENSE:
        return True
    try:
        return bool(row.get("settings") == way_of(row["method"]).settings)
    except KeyError:
        return False  # a way that is no longer run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, write the rows, the page and the pictures."""
    given = _parse(list(sys.argv[1:] if arguments is None else arguments))
    folder = RESULTS if given.out is None else given.out
    path = folder / "quality.json"
    rows = [] if given.fresh else earlier(path, given.epochs)
    have = {identity(row) for row in rows}
    missing = [task for task in tasks_of(given) if task[:4] not in have]

    def save() -> None:
        write_results(
            "quality", rows, threads=1, seeds=sorted({r["seed"] for r in rows}), folder=folder,
            more={"epochs": given.epochs, "nets": settings_of_nets()},
        )  # fmt: skip

    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    context = multiprocessing.get_context("spawn")
    mistakes: list[str] = []
    try:
        with (
            context.Pool(given.jobs, maxtasksperchild=200) as pool,
            tqdm(total=len(missing), unit="run", disable=None) as bar,
        ):
            for made, mistake in pool.imap_unordered(attempt, missing):
                rows += made
                mistakes += [mistake] if mistake else []
                save()
                bar.update()
    except KeyboardInterrupt:
        print(f"bench.run_quality: stopped; {len(rows)} rows are in {path}", file=sys.stderr)
        return 130
    save()
    pages = (ROOT / "bench", ROOT / "docs" / "images") if given.out is None else (folder, folder)
    quality_report.write(path, *pages)
    print(f"{path}, {pages[0] / 'quality.md'}")
    return tell(mistakes)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS), help="to train")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--sparsity", nargs="+", type=fraction, default=list(SPARSITIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--epochs", type=count, help="for a trial; each network has its own")
    parser.add_argument("--jobs", type=count, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--no-sweep", action="store_true", help="leave the alpha-beta sweep out")
    parser.add_argument("--no-counts", action="store_true", help="leave the larger networks out")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument(
        "--out", type=Path, help="folder; default bench/results, bench/ and docs/images/"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
