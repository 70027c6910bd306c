"""What a row of the comparison says, for its page and its picture."""

from __future__ import annotations

from bench.timing import Row


def step_seconds(row: Row, prefix: str) -> float | None:
    """Time of a step or round, from those that were made."""
    made = row["effort"] if row[f"{prefix}status"] == "finished" else row.get(f"{prefix}done")
    if not row["effort"] or not made or row[f"{prefix}seconds"] is None:
        return None
    return float(row[f"{prefix}seconds"] / made)


def shown_ratio(row: Row) -> tuple[float, str] | None:
    """How many times faster, and what of: "" the whole run, "a step", or ">" a lower bound."""
    if row["ratio"] is None:
        return None
    if row["reference_status"] == "finished":
        return row["ratio"], ""
    ours, theirs = step_seconds(row, ""), step_seconds(row, "reference_")
    if ours is not None and theirs is not None:
        return theirs / ours, "a step"
    return row["ratio"], ">"
