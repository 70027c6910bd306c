"""Tables: made once, shown as text, Markdown, HTML or on a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paikern.analysis import LayerTopology, Topology
from paikern.masks import MaskSet


@dataclass(frozen=True)
class Column:
    """A heading; numbers go to the right."""

    title: str
    right: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as text, all rows as wide as `columns`; `footer` holds totals.

    >>> print(Table((Column("layer"), Column("kept", right=True)), [("fc", "12")]).plain())
    layer  kept
    fc       12
    """

    columns: tuple[Column, ...]
    rows: Sequence[tuple[str, ...]]
    footer: tuple[str, ...] | None = None
    title: str = ""

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """Rows and footer."""
        return [*self.rows, *([self.footer] if self.footer else [])]

    def plain(self) -> str:
        """Aligned text; no line has blanks at its end."""
        grid = [tuple(c.title for c in self.columns), *self.lines]
        widths = [max(len(row[i]) for row in grid) for i in range(len(self.columns))]
        text = []
        for row in grid:
            cells = [
                cell.rjust(width) if column.right else cell.ljust(width)
                for cell, width, column in zip(row, widths, self.columns, strict=True)
            ]
            text.append("  ".join(cells).rstrip())
        return "\n".join([*([self.title] if self.title else []), *text])

    def markdown(self) -> str:
        """A Markdown table; the footer is its last row."""
        rule = ["---:" if column.right else "---" for column in self.columns]
        rows = [[_no_bar(c.title) for c in self.columns], rule]
        rows += [[_no_bar(cell) for cell in row] for row in self.lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def layer_table(masks: MaskSet, topology: Topology | None = None) -> Table:
    """One row a layer: kept, total, density, and with `topology` what lies on a path.

    Layers of the model that `masks` leaves alone are shown as dense.
    """
    columns = [Column("layer"), Column("shape"), Column("kept", True), Column("of", True)]
    columns += [Column("density", True)]
    known = {} if topology is None else {layer.name: layer for layer in topology.layers}
    if topology is not None:
        columns += [
            Column("effective nodes", True),
            Column("effective kernels", True),
            Column("effective params", True),
            Column("state"),
        ]
    names = [*known, *(name for name in masks if name not in known)]
    kept, shapes = masks.kept_by_layer, masks.shapes
    rows = []
    for name in names:
        layer = known.get(name)
        shape = shapes.get(name, layer.shape if layer else ())
        total = math.prod(shape)
        count = kept.get(name, total)
        row = [
            printable(name),
            shape_text(shape),
            f"{count:,}",
            f"{total:,}",
            percent(count, total),
        ]
        if topology is not None:
            row += _path_cells(layer, name in kept)
        rows.append(tuple(row))
    return Table(tuple(columns), rows, _footer(masks, topology))


def _path_cells(layer: LayerTopology | None, masked: bool) -> list[str]:
    if layer is None:
        return ["", "", "", ""]
    return [
        f"{layer.effective_nodes:,} / {layer.nodes:,}",
        f"{layer.effective_kernels:,} / {layer.kernels:,}",
        f"{layer.effective_params:,}",
        "dead" if layer.dead else "" if masked else "dense",
    ]


def _footer(masks: MaskSet, topology: Topology | None) -> tuple[str, ...]:
    total = ["total", "", f"{masks.kept:,}", f"{masks.total:,}", percent(masks.kept, masks.total)]
    if topology is not None:
        dead = sum(layer.dead for layer in topology.layers)
        total += [
            f"{topology.effective_nodes:,} / {sum(x.nodes for x in topology.layers):,}",
            f"{topology.effective_kernels:,} / {sum(x.kernels for x in topology.layers):,}",
            f"{topology.effective_params:,}",
            f"{dead} dead" if dead else "",
        ]
    return tuple(total)


def provenance_table(masks: MaskSet) -> Table:
    """What the mask file says about itself; long values are cut."""
    rows = []
    for key, value in masks.metadata.items():
        if key == "history":
            value = f"{len(value)} entries" if isinstance(value, list) else "unreadable"
        if key == "channels":
            value = f"of {len(value)} layers" if isinstance(value, Mapping) else "unreadable"
        if isinstance(value, Mapping):
            rows += [(f"{printable(key)}.{printable(k)}", _value(v)) for k, v in value.items()]
        else:
            rows.append((printable(key), _value(value)))
    return Table((Column("key"), Column("value")), rows)


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = printable(text)
    return text if len(text) <= 160 else text[:157] + "..."


def printable(text: Any) -> str:
    r"""Text of a file, safe to print: control characters, which terminals obey, as escapes.

    >>> print(printable("layer\x1b[31m"))
    layer\x1b[31m
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in str(text)
    )


def percent(part: int, whole: int) -> str:
    """
    >>> percent(5418, 270896)
    '2.00 %'
    """
    return f"{100 * part / whole:.2f} %" if whole else "-"


def shape_text(shape: Sequence[int]) -> str:
    """
    >>> shape_text((16, 3, 3, 3))
    '16 x 3 x 3 x 3'
    """
    return " x ".join(str(size) for size in shape)


def log_text(value: float) -> str:
    """A logarithm of a path count; -inf means that there is no path.

    >>> log_text(65.4321), log_text(float("-inf"))
    ('65.43', 'no path')
    """
    return "no path" if value == -math.inf else f"{value:.2f}"


def _no_bar(text: str) -> str:
    return text.replace("|", "\\|")
