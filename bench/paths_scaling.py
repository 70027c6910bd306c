"""Memory of a SynFlow run, and how time and memory of a round grow from 1 M to 1 G weights.

Each case is a process of its own (`bench/paths_process.py`), small ones first; one that would not
fit into memory or the time given is left out and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from bench import run_selection
from bench.paths_process import LOOP, MILLION, MODELS, OURS, ROUNDS, Case, Measurer, Usage, side_of
from bench.timing import Row

#: Millions (2**20) of weights.
SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
QUICK_SIZES = (1, 4, 8, 16, 32)
FITTED = (8, 512)
MEMORY = ("vgg16_bn", "resnet50", "stack-64", "stack-256")
QUICK_MEMORY = ("vgg16_bn", "stack-4")
#: Bytes a weight, model included: what a case is expected to need at most.
BYTES = {OURS: 4 + 4, LOOP: 4 + 36}
MOST_BYTES = 14 << 30
LOOP_SECONDS = 60.0  # of all rounds of the loop


def memory_allowed() -> int:
    """Bytes that a case may take."""
    return min(MOST_BYTES, run_selection.memory_available() - run_selection.SPARE)


def fits(case: Case) -> bool:
    """Whether a case is expected to fit into memory; the zoo's models always do."""
    if case.model in MODELS:
        return True
    return BYTES[case.who] * 4 * side_of(case.model) ** 2 < memory_allowed()


def grown(last: Usage | None, case: Case) -> float:
    """Seconds of the rounds of a larger stack, from those of the last one."""
    if last is None:
        return 0.0
    weights = 4 * side_of(case.model) ** 2
    return ROUNDS[case.who] * last.round_seconds * weights / last.weights


def run_memory(threads: int, quick: bool, left_out: list[str]) -> list[Usage]:
    """paikern and the loop on each model."""
    cases = [Case(who, model) for model in (QUICK_MEMORY if quick else MEMORY) for who in ROUNDS]
    left_out += [case.name for case in cases if not fits(case)]
    names = [case.name for case in cases if fits(case)]
    with Measurer(threads) as measure:
        return [measure(name) for name in tqdm(names, unit="model")]


def run_scaling(threads: int, quick: bool, left_out: list[str]) -> list[Usage]:
    """Both on stacks of growing size, the loop up to where it no longer fits."""
    found: list[Usage] = []
    last: dict[str, Usage] = {}
    cases = [*_cases(QUICK_SIZES if quick else SIZES)]
    with Measurer(threads) as measure, tqdm(cases, unit="size") as bar:
        for case in bar:
            bar.set_description(case.name)
            slow = case.who == LOOP and grown(last.get(LOOP), case) > LOOP_SECONDS
            if slow or not fits(case):
                left_out.append(case.name)
                continue
            last[case.who] = measure(case.name)
            found.append(last[case.who])
    return found


def _cases(sizes: Sequence[int]) -> Iterator[Case]:
    for size in sizes:
        for who in ROUNDS:
            yield Case(who, f"stack-{size}")


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent b of `seconds = c * weights**b`, fitted in logarithms from 8 M to 512 M weights.

    None with fewer than three points there.

    >>> slope([(2.0**e, 5 * 2.0 ** (1.5 * e)) for e in range(20, 30)])
    1.5
    """
    low, high = (0.9 * FITTED[0] * MILLION, 1.1 * FITTED[1] * MILLION)
    inside = [(x, y) for x, y in points if low <= x <= high]
    if len(inside) < 3:
        return None
    x, y = np.log(np.array(inside)).T
    return round(float(np.polyfit(x, y, 1)[0]), 4)


def usage_rows(usages: Sequence[Usage]) -> list[Row]:
    """Usages as they are written, with the ratio to the model."""
    return [{**usage._asdict(), "ratio": usage.ratio} for usage in usages]


def by_who(rows: Sequence[Row], value: str) -> dict[str, list[tuple[float, float]]]:
    """Who -> (weights, value) of the scaling study."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        who = Case.parse(row["name"]).who
        found.setdefault(who, []).append((float(row["weights"]), float(row[value])))
    return found


def rows_of(usages: Sequence[Usage], threads: int) -> list[Row]:
    """A row of the results for every size, against the loop where it was measured."""
    held: dict[str, dict[str, Usage]] = {}
    for usage in usages:
        case = Case.parse(usage.name)
        held.setdefault(case.model, {})[case.who] = usage
    rows: list[Row] = []
    for model, both in held.items():
        if OURS not in both:
            continue
        ours, loop = both[OURS], both.get(LOOP)
        rows.append(
            {
                "section": "scaling",
                "method": "synflow",
                "model": model,
                "sparsity": 1 - ours.kept / ours.weights,
                "threads": threads,
                "weights": ours.weights,
                "seconds": ours.round_seconds,
                "reference_seconds": loop and loop.round_seconds,
                "ratio": loop and loop.round_seconds / ours.round_seconds,
            }
        )
    return rows
