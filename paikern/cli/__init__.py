"""The `paikern` command.

Exit codes: 0 done, 1 a check failed, 2 wrong use or unreadable input, 130 interrupted. Everything
but 0 comes with one line on stderr; a traceback only with `--debug`.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from paikern.cli.console import Console, log_lines
from paikern.cli.parser import build_parser
from paikern.errors import PaikernError, PaikernWarning

__all__ = ["main"]

DONE, FAILED_CHECK, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: what follows `paikern`; None takes it from the process.

    >>> main(["prune", "--model", "lenet300", "--method", "random", "--sparsity", "0.9", "--quiet"])
    0
    """
    parser = build_parser()
    try:
        args, rest = parser.parse_known_args(argv)
        if rest and not getattr(args, "passes_on", False):
            parser.error(f"unknown arguments: {' '.join(rest)}")
    except SystemExit as stop:  # argparse: 0 after --help, 2 after an error
        return stop.code if isinstance(stop.code, int) else WRONG_USE
    args.rest = rest
    console = Console(quiet=getattr(args, "quiet", False))
    debug = getattr(args, "debug", False)
    with _warnings_as_lines(console, debug), log_lines(console):
        try:
            code: int = args.run(args, console)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            console.error("interrupted; no file is half-written")
            return INTERRUPTED
        except BrokenPipeError:  # `paikern inspect ... | head` has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the flush at exit
            return DONE
        except Exception as error:
            if debug:
                traceback.print_exc()
            console.error(_one_line(error))
            return WRONG_USE


def _one_line(error: Exception) -> str:
    """The message of an expected error; of any other its type as well, and how to see more."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, (PaikernError, ValueError, TypeError)):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    return f"{type(error).__name__}: {text[:300]} (--debug shows where)"


@contextmanager
def _warnings_as_lines(console: Console, debug: bool) -> Iterator[None]:
    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        console.warn(" ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.simplefilter("default" if debug else "ignore")
        warnings.simplefilter("always", PaikernWarning)
        warnings.showwarning = show
        yield
