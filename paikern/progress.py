"""Progress of long runs: a bar on a terminal, log lines otherwise, or the caller's own function."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("paikern")

ProgressFunction = Callable[[int, int, dict[str, float]], None]
"""Called as `progress(done, total, values)` after every round or step."""

# A log file wants to know that a run is alive, not every step of 3000.
_LOG_EVERY_SECONDS = 5.0


class Progress:
    """Reports rounds or steps; a context manager.

    Args:
        what: the method, shown in front.
        total: number of them.
        unit: "round", "step", "layer" or "weight".
        progress: None for a bar if stderr is a terminal and log lines otherwise, True for the bar,
            False for silence, or a function.
    """

    def __init__(
        self, what: str, total: int, unit: str, progress: bool | ProgressFunction | None
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._done = 0
        self._bar: Any = None
        self._function = progress if callable(progress) else None
        self._log = False
        self._logged_at = time.monotonic()
        if self._function is None and total > 1:
            if progress or (progress is None and sys.stderr.isatty()):
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, file=sys.stderr)
            else:
                self._log = progress is None

    def update(self, **values: float) -> None:
        """One round or step is done."""
        self.reach(self._done + 1, **values)

    def reach(self, done: int, **values: float) -> None:
        """So many of the total are done."""
        before, self._done = self._done, done
        if self._function is not None:
            self._function(self._done, self.total, values)
        elif self._bar is not None:
            shown = {name: f"{value:.4g}" for name, value in values.items()}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - before)
        elif self._log:
            now = time.monotonic()
            if now - self._logged_at >= _LOG_EVERY_SECONDS or self._done == self.total:
                self._logged_at = now
                text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                logger.info(
                    "%s: %s %d of %d: %s", self.what, self.unit, self._done, self.total, text
                )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
