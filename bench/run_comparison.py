"""DPaI, NPB, PHEW and SynFlow: paikern against plain PyTorch, whole runs, time and memory.

    python -m bench                          three networks, about five minutes
    python -m bench --full --publish         seven networks and the sparsities of the plots
    python -m bench --only phew --model vgg19_bn --sparsity 0.98 --limit 300
    python -m bench compare OLD.json NEW.json

Both sides run in turn in processes of their own, and each gets the median of its times. A run that
does not end within the limit is stopped and its row says how far it came. Results go to OUT
(`comparison.json`, `comparison.md`, `comparison.png`) and are written after every row: Ctrl-C loses
nothing that was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from tqdm import tqdm

from bench import comparison_report
from bench.comparison_cases import METHODS, MODELS, OURS, REFERENCE, SEED, Effort
from bench.comparison_worker import Order, Outcome, Worker
from bench.options import count, fraction, positive
from bench.timing import RESULTS, Row, machine, versions, write_results

ROOT = Path(__file__).parents[1]
THREADS = 2
REPEATS = 3
# A run this long is measured once: the median of three would triple hours and change little.
ONCE_FROM = 10.0
PATIENCE = 10  # limits of paikern's own run: what it takes is to be told, not cut

Cell = tuple[str, str, float]


class Setting(NamedTuple):
    """What a size of the comparison means."""

    models: tuple[str, ...]
    sparsities: dict[str, tuple[float, ...]]
    effort: Effort
    limit: float

    def cells(self) -> list[Cell]:
        return [
            (method, model, sparsity)
            for model in self.models
            for sparsity in self.sparsities.get(model, (0.98,))
            for method in METHODS
        ]


QUICK = Setting(("lenet300", "resnet20", "vgg19_bn"), {}, Effort(100, 100), 10.0)
FULL = Setting(
    tuple(MODELS),
    {
        "resnet20": (0.68, 0.9, 0.98, 0.99),
        "vgg19_bn": (0.9, 0.98),
        "resnet50@224": (0.9, 0.98),
    },
    Effort(300, 100),
    60.0,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and write what was measured."""
    given = _parse(list(sys.argv[1:] if arguments is None else arguments))
    setting = FULL if given.full else QUICK
    if given.model:
        setting = setting._replace(models=tuple(given.model))
    if given.sparsity:
        setting = setting._replace(sparsities=dict.fromkeys(setting.models, tuple(given.sparsity)))
    if given.limit:
        setting = setting._replace(limit=given.limit)
    cells = [cell for cell in setting.cells() if cell[0] in (given.only or METHODS)]
    console = Console()
    stopped = False
    out = RESULTS if given.publish else given.out.absolute()
    pages = (ROOT / "bench", ROOT / "docs" / "images") if given.publish else (out, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"bench: --out {out}: {error.strerror}", file=sys.stderr)
        return 2
    rows = earlier(out / "comparison.json", setting, given.threads) if given.resume else []
    have = {(row["method"], row["model"], row["sparsity"]) for row in rows}
    cells = [cell for cell in cells if cell not in have]
    try:
        for row in measured(cells, setting, given.threads, given.repeats):
            rows.append(row)
            path = write_results(
                "comparison", rows, threads=given.threads, seeds=[SEED], folder=out
            )
            comparison_report.write(path, *pages)
    except KeyboardInterrupt:
        stopped = True
    if not rows:
        return 130
    console.print(comparison_report.terminal_table(rows, given.threads))
    console.print(
        f"{out / 'comparison.json'}, {pages[0] / 'comparison.md'}, {pages[1] / 'comparison.png'}"
    )
    return 130 if stopped else 0


def earlier(path: Path, setting: Setting, threads: int) -> list[Row]:
    """The rows of a run that was stopped, as far as they were measured under the same settings."""
    if not path.exists():
        return []
    held = json.loads(path.read_text())
    if (held["machine"], held["versions"], held["threads"]) != (machine(), versions(), threads):
        return []
    return [
        row
        for row in held["rows"]
        if (row["limit"], row["effort"]) == (setting.limit, setting.effort.of(row["method"]))
    ]


def measured(cells: Sequence[Cell], setting: Setting, threads: int, repeats: int) -> Iterator[Row]:
    """The rows of the cells, one after the other."""
    with (
        Worker(threads) as ours,
        Worker(threads) as reference,
        tqdm(cells, unit="row", disable=None) as bar,
    ):
        for method, model, sparsity in bar:
            bar.set_description(f"{method} {model} {sparsity:g}")
            yield _row((method, model, sparsity), setting, (ours, reference), repeats)


def _row(cell: Cell, setting: Setting, workers: tuple[Worker, Worker], repeats: int) -> Row:
    """Both sides in turn, `repeats` times where they are short."""
    method, model, sparsity = cell
    outcomes: dict[str, list[Outcome]] = {OURS: [], REFERENCE: []}
    for index in range(repeats):
        sides = list(zip(outcomes, workers, strict=True))
        for who, worker in sides if index % 2 == 0 else reversed(sides):
            before = outcomes[who]
            if before and (before[0].status != "finished" or before[0].seconds > ONCE_FROM):
                continue
            order = Order(who, method, model, sparsity, setting.effort, judge=not before)
            limit = setting.limit * (PATIENCE if who == OURS else 1)
            before.append(worker.run(order, limit))
    row: Row = {"method": method, "model": model, "sparsity": sparsity}
    row["effort"] = setting.effort.of(method)
    row["limit"] = setting.limit
    for who, found in outcomes.items():
        row |= _columns("" if who == OURS else "reference_", found)
    row["ratio"] = ratio_of(row)
    return row


def ratio_of(row: Row) -> float | None:
    """The reference's time over paikern's; a lower bound where only the reference was stopped.

    None where paikern did not finish, where either failed, and where they kept masks of different
    weights.
    """
    if row["status"] != "finished" or row["reference_status"] == "failed":
        return None
    theirs = row.get("reference_weights")
    if theirs is not None and theirs != row["weights"]:
        return None
    return float(row["reference_seconds"] / row["seconds"])


def _columns(prefix: str, found: list[Outcome]) -> Row:
    """The columns of one side. Seconds of an unfinished run are its limit, of a failed one None."""
    first = next((o for o in found if o.status == "failed"), found[0])
    seconds = None if first.status == "failed" else statistics.median(o.seconds for o in found)
    columns: dict[str, Any] = {
        "seconds": seconds,
        "status": first.status,
        "repeats": len(found),
        "peak_bytes": first.peak_bytes,
        "kept": first.kept,
        "log_paths": first.log_paths,
    }
    if first.weights is not None:
        columns["weights"] = first.weights
    if first.status == "not finished":
        columns |= {"done": first.done, "total": first.total}
    if first.reason:
        columns["reason"] = first.reason
    return {prefix + name: value for name, value in columns.items()}


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="paikern bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="about five minutes (default)")
    size.add_argument("--full", action="store_true", help="everything, as long as it takes")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="these methods")
    parser.add_argument("--model", nargs="+", choices=MODELS, help="these networks")
    parser.add_argument("--sparsity", nargs="+", type=fraction, help="in (0, 1)")
    parser.add_argument(
        "--limit", type=positive, metavar="S", help="stop a reference after so many seconds"
    )
    parser.add_argument("--repeats", type=count, default=REPEATS, help="of short runs")
    parser.add_argument("--threads", type=count, default=THREADS)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench", help="a folder")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the results that OUT holds"
    )
    parser.add_argument(
        "--publish", action="store_true", help="into bench/ and docs/images/ instead of OUT"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
