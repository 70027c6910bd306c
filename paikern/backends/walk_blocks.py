"""How kernels of a weight are put into blocks for the tables of walks (csrc/cpu/phew.h)."""

from __future__ import annotations


def row_block(taps: int) -> int:
    """Kernels of a row in a block."""
    return 4 if taps >= 4 else 16


def column_block(taps: int) -> int:
    """Kernels of a column in a block: they lie in as many pages of memory."""
    return 1 if taps >= 4 else 4


def table_blocks(rows: int, cols: int, taps: int, groups: int) -> tuple[int, int]:
    """Entries of the table of one row, and of one column of a group."""
    return -(-cols // row_block(taps)), -(-(rows // groups) // column_block(taps))
