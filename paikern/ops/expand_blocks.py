"""expand_blocks: a bit for each block -> a bit for each weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paikern.backends.blocks import blocks_of, matrix_of
from paikern.ops._library import define, fake, run
from paikern.ops.block_means import check_block
from paikern.ops.unpack_mask import check_packed

define("expand_blocks(Tensor packed, int[] shape, int[] block) -> Tensor")


@fake("expand_blocks")
def _shape(packed: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    rows, columns = matrix_of(shape)
    return packed.new_empty((rows * columns + 7) // 8)


def expand_blocks(packed: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """`mask[i, j] = blocks[i // block[0], j // block[1]]` over the matrix of `block_means`.

    Args:
        packed: packed mask of the blocks, row-major.
        shape: of the weight, two or more dimensions.
        block: rows and columns of a block.

    Returns:
        The packed mask of the weight, uint8 `[ceil(numel / 8)]`.

    Raises:
        ValueError: a mask of another number of blocks, or a block without size.

    Example:
        >>> import torch
        >>> expand_blocks(torch.tensor([0b10], dtype=torch.uint8), (2, 4), (2, 2))
        tensor([204], dtype=torch.uint8)
    """
    size = check_block("expand_blocks", shape, block)
    down, across = blocks_of(shape, size)
    check_packed("expand_blocks", packed, down * across)
    bits: Tensor = run("expand_blocks", [packed], packed, list(shape), size)
    return bits
