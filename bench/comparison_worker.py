"""A process that runs one contender after another when it is told to, and can be stopped.

The comparison holds two of them, one for each side. Only one works at a time; a run past its time
limit is killed with its process, and the next run starts a new one. Orders and answers are lines of
JSON: `{"run": ...}` is answered by any number of `{"done": 3, "total": 100}` and one result.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.comparison_cases import SEED, Effort, Prepared, prepared, quality, run

ROOT = Path(__file__).parents[1]
_TELL_EVERY = 0.2  # seconds
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
# Starting Python, torch and the model is not the method's time: 86 M normal values take 2 s.
_PREPARATION_LIMIT = 300.0


class Order(NamedTuple):
    """One run. `judge` counts paths and weights of the masks afterwards, outside the time."""

    who: str
    method: str
    model: str
    sparsity: float
    effort: Effort
    judge: bool

    def text(self) -> str:
        return json.dumps({**self._asdict(), "effort": vars(self.effort)})


class Outcome(NamedTuple):
    """What became of it. `done` of `total` units (steps, rounds, layers or weights) were made."""

    status: str  # "finished", "not finished" or "failed"
    seconds: float
    peak_bytes: int | None = None
    kept: int | None = None
    log_paths: float | None = None
    weights: int | None = None
    done: int = 0
    total: int = 0
    reason: str = ""


class Worker:
    """The process of one side; a context manager."""

    def __init__(self, threads: int) -> None:
        self._environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "PYTHONWARNINGS": "ignore",
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def run(self, order: Order, limit: float) -> Outcome:
        """Carry out one order; after `limit` seconds of the run itself it is broken off."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(order.text().encode() + b"\n")
        process.stdin.flush()
        done = total = 0
        begun: float | None = None
        deadline = time.monotonic() + _PREPARATION_LIMIT
        while True:
            line = self._line(process, deadline)
            if line is None:
                self.stop()
                if begun is None:
                    return Outcome("failed", 0.0, reason="the model was not ready in time")
                return Outcome("not finished", limit, done=done, total=total)
            if not line:
                status = process.wait()
                self.stop()
                reason = "out of memory" if status == -signal.SIGKILL else f"exit status {status}"
                return Outcome("failed", 0.0, reason=reason, done=done, total=total)
            told = json.loads(line)
            if "begun" in told:
                begun = time.monotonic()
                deadline = begun + limit
            elif "judging" in told:
                deadline = time.monotonic() + _PREPARATION_LIMIT
            elif "status" in told:
                return Outcome(**told)
            else:
                done, total = told["done"], told["total"]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._pending = b""
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.comparison_worker"],
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the comparison, which stops its workers
            )
        return self._process

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        """The next line; empty at the end of the process, None at the deadline."""
        assert process.stdout is not None
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                return None
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return b""
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return line


# --- in the process ----------------------------------------------------------------------------


def _carry_out(order: Order, subject: Prepared) -> dict[str, Any]:
    from bench.selection_memory import peak_beyond

    told_at = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal told_at
        if (now := time.monotonic()) - told_at > _TELL_EVERY or done == total:
            told_at = now
            _tell({"done": done, "total": total})

    held: dict[str, Any] = {}

    def act() -> None:
        start = time.perf_counter()
        held["masks"] = run(
            order.who, order.method, order.model, subject, order.sparsity, order.effort, tick
        )
        held["seconds"] = time.perf_counter() - start

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory that is free but not given back would be reused
    _tell({"begun": True})
    try:
        peak = peak_beyond(act)
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return {"status": "failed", "seconds": 0.0, "reason": f"{type(error).__name__}: {text}"}
    found: dict[str, Any] = {
        "status": "finished",
        "seconds": held["seconds"],
        "peak_bytes": peak,
        "weights": sum(mask.numel() for mask in held["masks"].values()),
    }
    if order.judge:
        _tell({"judging": True})
        kept, log_paths = quality(subject, held["masks"])
        found |= {"kept": kept, "log_paths": log_paths}
    return found


_ANSWERS = os.dup(1)


def _tell(what: Mapping[str, Any]) -> None:
    os.write(_ANSWERS, json.dumps(what).encode() + b"\n")


def _warm_up(who: str) -> None:
    """What a first call loads is not the method's: every method once, on a small model."""
    import warnings

    import torch

    from bench.comparison_cases import METHODS
    from paikern import zoo

    subject = Prepared(zoo.create("mlp", sizes=(12, 16, 8), seed=SEED), torch.ones(1, 12), 320)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in METHODS:
            run(who, method, "mlp", subject, 0.5, Effort(2, 2), lambda *_: None)


def main() -> int:
    # A comparison that was killed takes its workers with it: a reference may run for hours.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.dup2(2, 1)  # whatever prints goes to stderr; answers have their own descriptor
    held: dict[str, Prepared] = {}
    warm: set[str] = set()
    for line in sys.stdin:
        told = json.loads(line)
        order = Order(**{**told, "effort": Effort(**told["effort"])})
        if order.who not in warm:
            _warm_up(order.who)
            warm.add(order.who)
        if order.model not in held:
            held.clear()
            held[order.model] = prepared(order.model)
        import torch

        torch.manual_seed(SEED)
        _tell(_carry_out(order, held[order.model]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
