"""`pattern=`: what the words mean, and how a pattern lies in the weight of a layer.

No tensors here; `paikern.structured` selects by patterns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from paikern.errors import SparsityError

__all__ = ["NM", "Blocks", "Layout", "Pattern", "parse_pattern"]

_WHOLE = ("row", "column", "kernel")
_KNOWN = (
    "'unstructured', 'n:m' (as '2:4'), 'block:RxC' (as 'block:16x16'), 'row', 'column', 'kernel'"
)


class Layout(NamedTuple):
    """How a weight is stored: `[out, in / groups, *kernel]`, or `[in, out / groups, *kernel]`.

    The second is transposed: transformers' `Conv1D` (`[in, out]`) and transposed convolutions.
    """

    transposed: bool = False
    groups: int = 1

    def outputs(self, shape: Sequence[int]) -> int:
        """How many outputs a weight of this shape has, each with as many inputs.

        >>> Layout().outputs((8, 3, 5, 5)), Layout(transposed=True).outputs((3, 8))
        (8, 8)
        """
        return shape[1] * self.groups if self.transposed else shape[0]


@dataclass(frozen=True)
class NM:
    """Of every `m` consecutive inputs of an output (at each kernel position) `n` are kept.

    >>> NM(2, 4).sparsity, str(NM(2, 4)), NM(2, 4).kept_of(11)
    (0.5, '2:4', 6)
    """

    n: int
    m: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def kept_of(self, inputs: int) -> int:
        """How many of so many inputs: n of each whole group, `ceil(r * n / m)` of r left over."""
        return inputs // self.m * self.n + -(-(inputs % self.m) * self.n // self.m)

    def inputs(self, shape: Sequence[int], layout: Layout) -> int:
        """How many inputs of one output follow each other in a weight."""
        return shape[0] // layout.groups if layout.transposed else shape[1]

    def fits(self, shape: Sequence[int], layout: Layout) -> bool:
        """Whether the layer has one whole group; if not, it stays dense."""
        return self.inputs(shape, layout) >= self.m

    def kept(self, shape: Sequence[int], layout: Layout) -> int:
        """Weights that a layer keeps."""
        total = math.prod(shape)
        if total == 0 or not self.fits(shape, layout):
            return total
        inputs = self.inputs(shape, layout)
        return total // inputs * self.kept_of(inputs)

    def grouped(self, shape: Sequence[int], layout: Layout) -> tuple[tuple[int, ...], int]:
        """The shape in which groups run along one dimension, and that dimension."""
        if not layout.transposed:
            return tuple(shape), 1
        if layout.groups == 1:
            return tuple(shape), 0
        return (layout.groups, shape[0] // layout.groups, *shape[1:]), 1

    def at(self, density: float) -> NM:
        """The pattern of a round that keeps `density`: no fewer than this one, no more than m."""
        return NM(min(self.m, max(self.n, math.ceil(density * self.m - 1e-9))), self.m)


@dataclass(frozen=True)
class Blocks:
    """Whole blocks are kept: of `rows` outputs by `columns` inputs, or what `kind` names.

    >>> str(Blocks("block", 16, 8)), Blocks("row").block((6, 4, 3, 3), Layout())
    ('block:16x8', (1, 36))
    """

    kind: str
    rows: int = 0
    columns: int = 0

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}" if self.kind == "block" else self.kind

    def block(self, shape: Sequence[int], layout: Layout) -> tuple[int, int]:
        """Rows and columns of a block of the stored matrix `[shape[0], everything else]`.

        A row is an output channel and a column an input channel, of its group where there are
        groups. A block acts on the matrix that a convolution multiplies by:
        `[out, in * kernel]`, and `[out * kernel, in]` if it is transposed.
        """
        first, rest, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
        if self.kind == "block":
            size = (self.columns, self.rows) if layout.transposed else (self.rows, self.columns)
        elif self.kind == "kernel":
            size = 1, kernel
        elif (self.kind == "row") == layout.transposed:
            size = first // layout.groups, kernel
        else:
            size = 1, rest
        return max(1, min(size[0], first)), max(1, min(size[1], rest))

    def at(self, density: float) -> Blocks:
        """The pattern of a round: always the same."""
        return self


Pattern: TypeAlias = "NM | Blocks"


def parse_pattern(text: str) -> Pattern | None:
    """The pattern that a string names; None for "unstructured".

    Raises:
        ValueError: no such pattern, or one without size.
        SparsityError: n:m that removes everything or nothing.

    >>> parse_pattern("2:4"), parse_pattern("block:16x16"), parse_pattern("unstructured")
    (NM(n=2, m=4), Blocks(kind='block', rows=16, columns=16), None)
    """
    if not isinstance(text, str):
        raise TypeError(f"pattern must be a string, got {type(text).__name__} {text!r}")
    if text == "unstructured":
        return None
    if text in _WHOLE:
        return Blocks(text)
    if found := re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text):
        n, m = int(found[1]), int(found[2])
        if not 1 <= n < m:
            raise SparsityError(
                f"pattern '{text}' keeps {n} of {m}; n:m needs 1 <= n < m, as '2:4'"
            )
        return NM(n, m)
    if found := re.fullmatch(r"block:([0-9]{1,9})x([0-9]{1,9})", text):
        rows, columns = int(found[1]), int(found[2])
        if rows < 1 or columns < 1:
            raise ValueError(f"pattern '{text}': a block needs at least one row and one column")
        return Blocks("block", rows, columns)
    raise ValueError(f"pattern: unknown pattern {text!r}; known: {_KNOWN}")
