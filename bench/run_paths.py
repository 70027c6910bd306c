"""The path engine against published-style loops in PyTorch and against the limits of the machine.

    python -m bench.run_paths                     everything, some 12 minutes on two cores
    python -m bench.run_paths --quick             two minutes, into out/bench
    python -m bench.run_paths --only sweeps dpai  these sections; the file keeps the others
    python -m bench.run_paths --no-write          prints the page instead
    python -m bench.run_paths --report-only       the page and the plot again, from the results

Writes paths.json into the folder of `--out`. With the default folder, bench/results, the page is
bench/paths.md and the plot docs/images/paths.png; otherwise both lie beside the file.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import (
    paths_profile,
    paths_report,
    paths_results,
    paths_runs,
    paths_scaling,
    paths_sweeps,
)
from bench.paths_results import SECTIONS
from bench.references import nth_element, peaks
from bench.timing import RESULTS, use_threads

ROOT = Path(__file__).parents[1]
QUICK_OUT = ROOT / "out" / "bench"
THREADS = 2
QUICK_ROUNDS = 5

Section = Callable[[int, bool], Mapping[str, Any]]


def sweeps(threads: int, quick: bool) -> Mapping[str, Any]:
    return {"rows": paths_sweeps.run(range(1, threads + 1), quick)}


def runs(threads: int, quick: bool) -> Mapping[str, Any]:
    rows = []
    for name in paths_runs.SYNFLOW:
        rounds, repeats = (QUICK_ROUNDS, 1) if quick else (paths_runs.ROUNDS, None)
        rows += paths_runs.compare_synflow(name, rounds=rounds, repeats=repeats)
    return {"rows": rows}


def dpai(threads: int, quick: bool) -> Mapping[str, Any]:
    from bench.run_dpai import NETWORKS

    return {"rows": [paths_runs.compare_dpai(name, quick=quick) for name in NETWORKS]}


def memory(threads: int, quick: bool) -> Mapping[str, Any]:
    left_out: list[str] = []
    usages = paths_scaling.run_memory(threads, quick, left_out)
    return {"usages": paths_scaling.usage_rows(usages), "left_out": left_out}


def scaling(threads: int, quick: bool) -> Mapping[str, Any]:
    left_out: list[str] = []
    usages = paths_scaling.run_scaling(threads, quick, left_out)
    return {
        "rows": paths_scaling.rows_of(usages, threads),
        "usages": paths_scaling.usage_rows(usages),
        "left_out": left_out,
    }


def px(threads: int, quick: bool) -> Mapping[str, Any]:
    if quick:
        return {"rows": paths_runs.compare_px(rounds=QUICK_ROUNDS, samples=10, repeats=1)}
    return {"rows": paths_runs.compare_px()}


def profile(threads: int, quick: bool) -> Mapping[str, Any]:
    models = paths_profile.QUICK_MODELS if quick else paths_profile.MODELS
    return {
        "peaks": peaks.measure(threads)._asdict(),
        "models": [paths_profile.profile(name, steps) for name, steps in models.items()],
    }


FUNCTIONS: dict[str, Section] = dict(
    zip(SECTIONS, (sweeps, runs, dpai, memory, scaling, px, profile), strict=True)
)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.run_paths",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small and short, into out/bench")
    parser.add_argument("--threads", type=int, choices=(1, 2), default=THREADS)
    parser.add_argument("--out", type=Path, help="folder of paths.json")
    parser.add_argument("--no-write", action="store_true", help="print the page, write nothing")
    parser.add_argument("--report-only", action="store_true", help="page and plot from the results")
    given = parser.parse_args(arguments)
    given.out = given.out or (QUICK_OUT if given.quick and not given.report_only else RESULTS)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that are asked for, then write page and plot."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = parse(arguments)
    path = given.out / "paths.json"
    if not given.report_only:
        try:
            nth_element.library()
        except nth_element.CompilerMissingError as error:
            print(error, file=sys.stderr)
            return 2
        use_threads("bench.run_paths", given.threads, arguments)
        gc.freeze()  # what is loaded by now need not be searched after every round
        found = {} if given.no_write else paths_results.earlier(path, given.threads, given.only)
        for name in given.only:
            print(f"{name} ...", file=sys.stderr)
            start = time.perf_counter()
            torch.set_num_threads(given.threads)
            found[name] = {
                **FUNCTIONS[name](given.threads, given.quick),
                "measured": time.strftime("%Y-%m-%d %H:%M"),
                "duration": time.perf_counter() - start,
            }
            if not given.no_write:
                paths_results.save(given.out, found, given.threads)
        if given.no_write:
            results = paths_results.content_of(found) | paths_results.about(given.threads)
            print(paths_report.page_text(results, "paths.png", "paths.json"))
            return 0
    if given.out.resolve() == RESULTS.resolve():
        page, plot = ROOT / "bench/paths.md", ROOT / "docs/images/paths.png"
    else:
        page, plot = given.out / "paths.md", given.out / "paths.png"
    paths_report.write(path, page, plot)
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
