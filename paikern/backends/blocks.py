"""How a weight is cut into blocks: what every backend has to agree on."""

from __future__ import annotations

import math
from collections.abc import Sequence


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """`[shape[0], everything else]`."""
    return shape[0], math.prod(shape[1:])


def blocks_of(shape: Sequence[int], block: Sequence[int]) -> tuple[int, int]:
    """How many blocks lie below and beside each other, the smaller ones at the edges included."""
    rows, columns = matrix_of(shape)
    return (rows + block[0] - 1) // block[0], (columns + block[1] - 1) // block[1]
