"""phew_tables: the cumulated shares by which biased walks draw, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.walk_blocks import table_blocks
from paikern.ops._library import define, fake, run

WEIGHTINGS = ("abs", "square", "inverse")

define("phew_tables(Tensor[] weights, Tensor geometry, int size, int weighting) -> Tensor")


@fake("phew_tables")
def _shape(weights: Sequence[Tensor], geometry: Tensor, size: int, weighting: int) -> Tensor:
    return geometry.new_empty(size, dtype=torch.float32)


def phew_tables(
    weights: Sequence[Tensor], geometry: Tensor, size: int, *, weighting: str = "abs"
) -> Tensor:
    """The shares of blocks of kernels in their row and in their column, cumulated.

    A weight is kernels `[rows, cols]` of `taps` elements; rows come in `groups`, cols are those of
    one group. The norm of a kernel is `n = sum |w|`. A row has an entry for every 16 kernels, a
    column of a group one for every 4, and with `taps >= 4` for every 4 and for each; the last is 1.
    A row or column of zeros has entries of 0. Sums are float64, one element after the other, and
    entries their float32: the same on any number of threads and any backend.

    Args:
        weights: contiguous, on the CPU, float32, float16, bfloat16 or float64.
        geometry: int64 `[len(weights), 8]`, see `paikern.pathgraph.walks.Walks`.
        size: entries of all tables together.
        weighting: "abs"; "square" has `n = sum w**2`; "inverse" weighs a kernel by `1 / n`, one
            of zeros by 0.

    Returns:
        float32 `[size]`.

    Raises:
        ValueError: an unknown weighting, or a geometry that does not fit.

    Source: specification of PHEW, section 1.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, 3.0], [0.0, 1.0]])
        >>> phew_tables([w], torch.tensor([[2, 2, 1, 1, 0, 0, 0, 2]]), 4)
        tensor([1., 1., 1., 1.])
    """
    check_walk_weights("phew_tables", weights, geometry, size)
    found: Tensor = run(
        "phew_tables", [*weights, geometry], list(weights), geometry, size, which(weighting)
    )
    return found


def which(weighting: str) -> int:
    """The number of a weighting."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    return WEIGHTINGS.index(weighting)


def check_walk_weights(
    operation: str, weights: Sequence[Tensor], geometry: Tensor, size: int
) -> None:
    """ValueError unless `geometry` describes contiguous `weights` and tables of `size` entries."""
    if geometry.dtype != torch.int64 or tuple(geometry.shape) != (len(weights), 8):
        raise ValueError(
            f"{operation}: geometry must be int64 [{len(weights)}, 8], got {geometry.dtype} "
            f"{list(geometry.shape)}"
        )
    for number, (w, row) in enumerate(zip(weights, geometry.tolist(), strict=True)):
        rows, cols, taps, groups, _, _, by_row, by_col = row
        fits = w.is_contiguous() and w.is_floating_point() and w.numel() == rows * cols * taps
        fits = fits and min(rows, cols, taps, groups) > 0 and rows % groups == 0
        if fits:
            across, down = table_blocks(rows, cols, taps, groups)
            fits = 0 <= by_row <= size - rows * across
            fits = fits and 0 <= by_col <= size - groups * cols * down
        if not fits:
            raise ValueError(
                f"{operation}: weight {number} of shape {list(w.shape)} does not fit its row "
                f"{row} of the geometry, or tables of {size} entries"
            )
