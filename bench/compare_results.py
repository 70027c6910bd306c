"""Two results files of the same benchmark side by side: what became faster, slower or different.

    python -m bench compare OLD.json NEW.json
    python -m bench compare OLD.json NEW.json --tolerance 0.2

Rows are matched by everything that says what was run. Ends with 1 where a row is slower than before
by more than the tolerance, found something else (weights, paths, accuracy, ...), or is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bench.selection_report import ratio_text, seconds_text
from bench.timing import SCHEMA_VERSION, Row

#: What a row was, as opposed to what was found out.
IDENTITY = (
    "section", "op", "method", "model", "size", "shape", "numel", "sparsity", "density", "keep",
    "seed", "variant", "threads", "effort", "rounds", "reference", "dtype", "layout",
    "distribution", "pattern", "scope", "kind",
)  # fmt: skip
TOLERANCE = 0.1
#: What a row found out besides its time. Rounding may move the last digits of a sum.
FACTS = (
    "status", "reference_status", "kept", "reference_kept", "log_paths", "reference_log_paths",
    "accuracy", "nodes", "kernels", "params", "empty_layers", "mask_agreement",
)  # fmt: skip
ROUNDING = 1e-6

Key = tuple[tuple[str, Any], ...]


class Change(NamedTuple):
    """One line of the comparison; `bad` ends it with exit code 1."""

    key: Key
    before: float | None
    after: float | None
    verdict: str
    bad: bool


def load(path: Path) -> Mapping[str, Any]:
    """A results file; ValueError in one line where it is none."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
        raise ValueError(f"{path}: no results file; it must hold a list of rows")
    for number, row in enumerate(content["rows"]):
        seconds = row.get("seconds") if isinstance(row, dict) else "no object"
        if seconds is not None and not isinstance(seconds, int | float):
            raise ValueError(f"{path}: row {number} is no row of results ({seconds!r})")
    if content.get("schema") != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema {content.get('schema')!r}, this program reads {SCHEMA_VERSION}"
        )
    return content


def key_of(row: Row) -> Key:
    """What was run, as far as the row says so."""
    return tuple((name, _plain(row[name])) for name in IDENTITY if row.get(name) is not None)


def changes(old: Sequence[Row], new: Sequence[Row], tolerance: float) -> list[Change]:
    """Every row of either file, in the order of the old one; repeated keys in their order."""
    before, after = _numbered(old), _numbered(new)
    found = []
    for key in dict.fromkeys([*before, *after]):
        a, b = before.get(key), after.get(key)
        if a is None or b is None:
            present = a if b is None else b
            assert present is not None
            seconds = present.get("seconds")
            pair = (seconds, None) if b is None else (None, seconds)
            found.append(Change(key, *pair, "missing" if b is None else "new", bad=b is None))
            continue
        found.append(_change(key, a, b, tolerance))
    return found


def _change(key: Key, a: Row, b: Row, tolerance: float) -> Change:
    before, after = a.get("seconds"), b.get("seconds")
    words = [
        f"{name} {_fact(a, name)} -> {_fact(b, name)}"
        for name in FACTS
        if not _same(a.get(name), b.get(name)) or (name in a) != (name in b)
    ]
    bad = bool(words)
    # The time of a run that was stopped is its limit.
    whole = all(row.get("status", "finished") == "finished" for row in (a, b))
    if whole and (before is None) != (after is None):
        words.append("no time" if after is None else "a time at last")
        bad |= after is None
    elif whole and before and after:
        ratio = before / after
        if ratio < 1 / (1 + tolerance):
            words.append(f"slower, {ratio_text(1 / ratio)} the time")
            bad = True
        elif ratio > 1 + tolerance:
            words.append(f"faster, {ratio_text(ratio)}")
    return Change(key, before, after, "; ".join(words) or "same", bad)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=ROUNDING)
    return bool(a == b)


def _fact(row: Row, name: str) -> str:
    value = row.get(name, "missing")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _numbered(rows: Sequence[Row]) -> dict[Key, Row]:
    found: dict[Key, Row] = {}
    for row in rows:
        key = key_of(row)
        count = 0
        while (numbered := (*key, ("#", count)) if count else key) in found:
            count += 1
        found[numbered] = row
    return found


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 0 where nothing got worse, 1 where something did, 2 for unreadable files."""
    parser = argparse.ArgumentParser(
        prog="paikern bench compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, metavar="F",
        help="a change of the time by less than this fraction is noise (default %(default)s)",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        if not given.tolerance >= 0:
            raise ValueError(f"--tolerance must be >= 0, got {given.tolerance}")
        old, new = load(given.old), load(given.new)
    except ValueError as error:
        print(f"bench compare: {error}", file=sys.stderr)
        return 2
    console = Console()
    for name in ("machine", "versions", "threads", "seeds"):
        if old.get(name) != new.get(name):
            console.print(f"{name}: {old.get(name)} -> {new.get(name)}", highlight=False)
    found = changes(old["rows"], new["rows"], given.tolerance)
    table = Table()
    for name, justify in (("row", "left"), ("before", "right"), ("after", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for change in found:
        cells = [_text(change.before), _text(change.after), change.verdict]
        table.add_row(_name(change.key), *cells, style="bold" if change.bad else "")
    console.print(table)
    worse = sum(change.bad for change in found)
    console.print(f"{len(found)} rows, {worse} worse")
    return 1 if worse else 0


def _name(key: Key) -> str:
    return ", ".join(
        str(value) if name in ("op", "method", "model") else f"{name} {value}"
        for name, value in key
    )


def _text(seconds: float | None) -> str:
    return "" if seconds is None else seconds_text(seconds)


if __name__ == "__main__":
    raise SystemExit(main())
