"""What is found by name; where a name is unknown the nearest is told."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The question whether another name was meant; `otherwise` where none is near.

    >>> nearest("synflo", ["dpai", "synflow"])
    "did you mean 'synflow'?"
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def by_name(
    table: Mapping[str, _T],
    name: object,
    *,
    parameter: str,
    what: str,
    example: str,
    fix: str,
    more: str = "",
) -> _T:
    """The entry of `table` under `name`, in which capitals and hyphens do not count.

    Args:
        table: keys in lower case with underscores.
        name: what the user gave.
        parameter: what the user gave it as; messages begin with it.
        what: a word for the names.
        example: of a name, where something else than a name was given.
        fix: in place of the nearest name where none is near.
        more: the end of the message.

    Raises:
        ValueError: an unknown name. TypeError: no name.

    >>> words = {"parameter": "method", "what": "method", "example": "snip", "fix": ""}
    >>> by_name({"grasp_it": 7}, "GraSP-It", **words)
    7
    """
    if not isinstance(name, str):
        raise TypeError(
            f"{parameter}: give the name of a method, such as {example!r}; got {name!r}"
        )
    key = name.lower().replace("-", "_")
    if key in table:
        return table[key]
    listed = ", ".join(sorted(table))
    raise ValueError(
        f"{parameter}: unknown {what} {name!r}; {nearest(key, table, fix)} Available: "
        f"{listed}{more}"
    )


def check_options(kind: str, name: str, known: Collection[str], options: Iterable[str]) -> None:
    """Refuse an option that is not `known` of the method `name`.

    Raises:
        ValueError: it names the option, the nearest one and all there are.
    """
    for option in options:
        if option not in known:
            near = nearest(option, known)
            listed = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"{option}: {kind} {name!r} has no such option; {near}{' ' if near else ''}"
                f"its options: {listed}"
            )
