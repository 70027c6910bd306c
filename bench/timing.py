"""Timing contenders fairly, and writing what was measured.

Contenders run in turn (a b, b a, a b, ...), so that a slow minute of the machine hits all of them;
each gets the median of its own times. A results file says on what it was measured.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def interleave(
    contenders: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Return every contender's times in seconds, after `warmup` untimed rounds.

    The order turns round every time, so that none always runs on the caches its rival left.

    >>> times = interleave({"a": lambda: None, "b": lambda: None}, repeats=3)
    >>> [len(samples) for samples in times.values()]
    [3, 3]
    """
    if repeats < 1:
        raise ValueError(f"interleave: repeats must be >= 1, got {repeats}")
    names = list(contenders)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(-warmup, repeats):
            for name in names if index % 2 == 0 else reversed(names):
                start = time.perf_counter()
                contenders[name]()
                elapsed = time.perf_counter() - start
                if index >= 0:
                    samples[name].append(elapsed)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return samples


def compare(
    ours: Callable[[], object],
    reference: Callable[[], object],
    *,
    repeats: int,
    warmup: int = 1,
) -> dict[str, float]:
    """Return the columns `seconds`, `reference_seconds` and `ratio` (reference over ours)."""
    times = interleave({"ours": ours, "reference": reference}, repeats=repeats, warmup=warmup)
    seconds = statistics.median(times["ours"])
    reference_seconds = statistics.median(times["reference"])
    return {
        "seconds": seconds,
        "reference_seconds": reference_seconds,
        "ratio": reference_seconds / seconds,
    }


def use_threads(module: str, threads: int, arguments: Sequence[str]) -> None:
    """Make this process run with `threads` threads, starting `python -m module` again if it must.

    OpenMP reads its number of threads once, before Python could set it.
    """
    wanted = str(threads)
    if os.environ.get("OMP_NUM_THREADS") != wanted:
        environment = os.environ | {"OMP_NUM_THREADS": wanted, "MKL_NUM_THREADS": wanted}
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)
    torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, system."""
    model = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the name that Python knows will do
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.system()}


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and paikern."""
    from paikern.version import __version__

    return {"python": platform.python_version(), "torch": torch.__version__, "paikern": __version__}


def write_results(
    name: str,
    rows: Sequence[Row],
    *,
    threads: int,
    seeds: Sequence[int],
    folder: Path = RESULTS,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder/name.json` as a whole or not at all and return its path.

    A row holds "op" or "method", "model" or "size", "sparsity", "seconds", "reference_seconds" and
    "ratio"; further keys are allowed. `more` is added to the head of the file.
    """
    for row in rows:
        missing = {"sparsity", "seconds", "reference_seconds", "ratio"} - row.keys()
        missing |= set() if {"op", "method"} & row.keys() else {"method"}
        missing |= set() if {"model", "size"} & row.keys() else {"model"}
        if missing:
            raise ValueError(f"write_results: row lacks {sorted(missing)}: {row}")
    content = {
        "schema": SCHEMA_VERSION,
        "machine": machine(),
        "versions": versions(),
        "threads": threads,
        "seeds": list(seeds),
        **(more or {}),
        "rows": list(rows),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
    return path
