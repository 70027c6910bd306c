"""Where the commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paikern.report.files import to_json
from paikern.report.tables import Table, printable


class Console:
    """Tables for people on a terminal (rich), aligned text for pipes and logs, JSON for programs.

    Streams are looked up at each call, so redirected ones are respected. `quiet` leaves results
    and progress out; errors, failed checks and warnings are always shown, each on one line.
    `warnings` keeps what was warned of.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.warnings: list[str] = []

    def table(self, table: Table) -> None:
        if self.quiet:
            return
        if sys.stdout.isatty():
            _rich(table)
        else:
            print(table.plain())

    def line(self, text: str = "") -> None:
        if not self.quiet:
            print(printable(text))

    def json(self, value: Any) -> None:
        """Asked for by name, so it is not silenced."""
        print(to_json(value))

    def progress(self, text: str) -> None:
        if not self.quiet:
            _stderr(printable(text))

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        _stderr(f"paikern: warning: {printable(text)}")

    def error(self, text: str) -> None:
        _stderr(f"paikern: {printable(text)}")


@contextmanager
def log_lines(console: Console) -> Iterator[None]:
    """Show the package's log records: progress comes as these where stderr is no terminal."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.progress(record.getMessage())

    logger = logging.getLogger("paikern")
    handler, level = Lines(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _rich(table: Table) -> None:
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_footer=table.footer is not None,
        pad_edge=False,
    )
    for index, column in enumerate(table.columns):
        # Text, because a layer may be called "[red]" and that is not a colour.
        shown.add_column(
            Text(column.title),
            justify="right" if column.right else "left",
            footer=Text(table.footer[index]) if table.footer else "",
            overflow="fold",
        )
    for row in table.rows:
        shown.add_row(*[Text(cell, style="bold red" if cell == "dead" else "") for cell in row])
    RichConsole().print(shown)
