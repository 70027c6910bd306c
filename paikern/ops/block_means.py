"""block_means: the mean score of every rectangular block of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.blocks import blocks_of, matrix_of
from paikern.ops._library import define, fake, run
from paikern.ops.nm_mask_factored import check_factors
from paikern.ops.topk_mask import check_scores, named_nan

define("block_means(Tensor scores, int[] block, bool absolute) -> Tensor")
define(
    "block_means_factored(Tensor weight, Tensor a, Tensor g, Tensor mask, int[] block, int power) "
    "-> Tensor"
)


@fake("block_means")
def _shape(scores: Tensor, block: Sequence[int], absolute: bool) -> Tensor:
    return scores.new_empty(blocks_of(scores.shape, block), dtype=torch.float64)


@fake("block_means_factored")
def _shape_factored(
    weight: Tensor, a: Tensor, g: Tensor, mask: Tensor, block: Sequence[int], power: int
) -> Tensor:
    return weight.new_empty(blocks_of(weight.shape, block), dtype=torch.float64)


def block_means(
    scores: Tensor, block: Sequence[int], *, absolute: bool = False, name: str | None = None
) -> Tensor:
    """The mean of each block of `scores`, seen as the matrix `[shape[0], everything else]`.

    Blocks begin at the first element; those at the far edges are smaller if the matrix is no
    multiple of them, and their mean is over what they hold. Sums are float64 in one fixed order:
    lane j of eight adds the elements whose position in their row of the block is j modulo 8, row
    after row, and the lanes are added from the first to the last. So the result is the same, bit
    for bit, on any number of threads and any backend.

    Args:
        scores: two or more dimensions, float32, float16, bfloat16 or float64, any strides.
        block: rows and columns of a block, each at least 1; more than the matrix has is all of
            them.
        absolute: means of magnitudes.
        name: of the tensor, for errors.

    Returns:
        float64 `[ceil(rows / block[0]), ceil(columns / block[1])]`.

    Raises:
        ValueError: a block without size, or fewer than two dimensions.
        NonFiniteScoreError: NaN, also as the mean of infinities of both signs.

    Example:
        >>> import torch
        >>> block_means(torch.arange(10.0).reshape(2, 5), (2, 2))
        tensor([[3.0000, 5.0000, 6.5000]], dtype=torch.float64)
    """
    (tensor,) = check_scores("block_means", scores)
    size = check_block("block_means", tensor.shape, block)
    with named_nan(None if name is None else [name]):
        means: Tensor = run("block_means", [tensor], tensor, size, absolute)
        return means


def block_means_factored(
    weight: Tensor,
    a: Tensor,
    g: Tensor,
    block: Sequence[int],
    *,
    power: int = 1,
    mask: Tensor | None = None,
    name: str | None = None,
) -> Tensor:
    """`block_means` of `|w[o, i]|**power * a[i] * g[o]`, no score tensor made.

    Args:
        weight, a, g, power: as in `nm_mask_factored`, for one layer.
        block, name: as in `block_means`.
        mask: packed mask of the candidates; other weights count as -1, which ranks a block without
            candidates below all that have one.

    Returns:
        As `block_means`.

    Raises:
        ValueError: shapes that do not fit, or a block without size.
        NonFiniteScoreError: a candidate's score is NaN.

    Example:
        >>> import torch
        >>> block_means_factored(torch.ones(2, 2), torch.tensor([1.0, 3.0]), torch.ones(2), (1, 2))
        tensor([[2.],
                [2.]], dtype=torch.float64)
    """
    (held,) = check_scores("block_means_factored", weight)
    check_factors("block_means_factored", name or "the layer", held, a, g, mask, power)
    size = check_block("block_means_factored", held.shape, block)
    candidates = torch.empty(0, dtype=torch.uint8, device=held.device) if mask is None else mask
    with named_nan(None if name is None else [name]):
        means: Tensor = run(
            "block_means_factored", [held, a, g], held, a, g, candidates, size, power
        )
        return means


def check_block(operation: str, shape: Sequence[int], block: Sequence[int]) -> list[int]:
    """Rows and columns of a block, cut to those of the matrix."""
    if len(shape) < 2:
        raise ValueError(f"{operation}: blocks need two or more dimensions, got {tuple(shape)}")
    if len(block) != 2 or min(block) < 1:
        raise ValueError(
            f"{operation}: block must be [rows, columns], each at least 1, got {list(block)}"
        )
    rows, columns = matrix_of(shape)
    return [min(block[0], max(rows, 1)), min(block[1], max(columns, 1))]
