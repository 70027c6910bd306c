"""The picture of docs/kernels.md: what moves between a GPU's memory and its multiprocessors.

    python -m bench.kernels_plot         writes docs/images/kernels.png

Drawn from the definitions of the kernels, in bytes for one float32 weight; nothing in it is a
measurement.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PATH = Path(__file__).parents[1] / "docs/images/kernels.png"
MEMORY, CHIP, READ, WRITE = "#dfe6ee", "#fdf3e3", "#2f7fc1", "#c8452f"
INK, GREY = "#22303d", "#7d8a99"


class Move(NamedTuple):
    """An arrow: what is read or written, how many bytes a weight (0: too little to count)."""

    what: str
    nbytes: float
    written: bool = False


class Kernel(NamedTuple):
    title: str
    does: str
    moves: Sequence[Move]


ROUND = (
    Kernel(
        "forward sweep", "z = |W|ᵖ x\nrows, in registers", (Move("weight", 4), Move("mask", 1 / 8))
    ),
    Kernel(
        "adjoint sweep + score",
        "x = |W|ᵖᵀ g, and\n|w|ᵖ a g against the band",
        (
            Move("weight", 4),
            Move("mask", 1 / 8),
            Move("bits above the band", 1 / 8, True),
            Move("bits inside it", 1 / 8, True),
        ),
    ),
    Kernel(
        "selection",
        "exact rank among those\ninside the band, ties in order",
        (Move("bits inside", 1 / 8), Move("keys of about 1 %", 0.3), Move("mask", 1 / 8, True)),
    ),
)
PLAIN = (
    Move("|W| made", 8),
    Move("forward", 4),
    Move("backward", 8),
    Move("scores made", 12),
    Move("joined", 8),
    Move("threshold", 16),
    Move("float mask", 8),
    Move("W * mask", 12),
)


def _box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec=GREY, lw=0.8))


def _round(axes: Axes) -> None:
    axes.set(xlim=(0, 12), ylim=(0, 6))
    axes.axis("off")
    axes.set_title("One round of SynFlow on the device: two reads of the weights, bits written",
                   fontsize=11, loc="left", color=INK)  # fmt: skip
    _box(axes, 0.1, 0.35, 11.8, 1.1, MEMORY)
    axes.text(0.3, 0.9, "device memory", fontsize=9, color=INK, va="center")
    for column, kernel in enumerate(ROUND):
        left = 0.5 + 3.9 * column
        _box(axes, left, 3.7, 3.3, 1.6, CHIP)
        axes.text(left + 1.65, 4.95, kernel.title, ha="center", weight="bold", fontsize=9.5)
        axes.text(left + 1.65, 4.3, kernel.does, ha="center", va="center", fontsize=8.5)
        step = 3.3 / (len(kernel.moves) + 1)
        for number, move in enumerate(kernel.moves, 1):
            x = left + step * number
            low, high = (x, 1.5), (x, 3.62)
            ends = (high, low) if move.written else (low, high)
            axes.add_patch(
                FancyArrowPatch(
                    *ends, arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0,
                    color=WRITE if move.written else READ, lw=0.8 + 1.1 * move.nbytes,
                )
            )  # fmt: skip
            axes.text(x + 0.11, 2.56, f"{move.what}\n{_bytes(move.nbytes)}", fontsize=7,
                      rotation=90, va="center", ha="left", linespacing=1.1, color=INK)  # fmt: skip
        if column < 2:
            axes.add_patch(
                FancyArrowPatch((left + 3.38, 4.5), (left + 3.82, 4.5), arrowstyle="-|>",
                                mutation_scale=11, color=GREY)
            )  # fmt: skip
    axes.text(0.5, 5.62, "blue: read, red: written, bytes for one float32 weight; vectors, tables "
              "and thresholds are too small to draw, and stay on the device between rounds",
              fontsize=7.5, color=GREY)  # fmt: skip


def _bytes(number: float) -> str:
    return {1 / 8: "⅛ B"}.get(number, f"{number:g} B")


def _sums(axes: Axes) -> None:
    ours = [move for kernel in ROUND for move in kernel.moves]
    for row, (name, moves) in enumerate((("PyTorch loop", PLAIN), ("paikern", ours))):
        at = 0.0
        for index, move in enumerate(moves):
            shade = (READ, "#7db0dc")[index % 2] if not move.written else WRITE
            axes.barh(row, move.nbytes, left=at, color=shade, edgecolor="white", linewidth=0.6)
            if move.nbytes >= 6:
                axes.text(at + move.nbytes / 2, row, move.what, ha="center", va="center",
                          fontsize=7, color="white")  # fmt: skip
            at += move.nbytes
        axes.text(at + 0.6, row, f"{at:.1f} bytes", va="center", fontsize=8.5, color=INK)
        axes.text(-0.8, row, name, va="center", ha="right", fontsize=8.5, color=INK)
    axes.set(xlim=(0, 90), ylim=(-0.6, 1.6), yticks=[])
    axes.set_title("Bytes moved for a float32 weight and round, counted from the definitions",
                   fontsize=11, loc="left", color=INK)  # fmt: skip
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8)


def totals() -> tuple[float, float]:
    """Bytes a weight of a round: paikern's, and of a loop that makes each tensor."""
    ours = sum(move.nbytes for kernel in ROUND for move in kernel.moves)
    return ours, sum(move.nbytes for move in PLAIN)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    path = Path(given[0]) if given else PATH
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3.1, 1))
    _round(above)
    _sums(below)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    os.replace(temporary, path)
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
