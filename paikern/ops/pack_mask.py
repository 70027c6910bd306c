"""pack_mask: a boolean mask as one bit a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from paikern.ops._library import define, fake, of_gpu_array

define("pack_mask(Tensor mask) -> Tensor")


@fake("pack_mask")
def _shape(mask: Tensor) -> Tensor:
    return mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)


def pack_mask(mask: Tensor) -> Tensor:
    """`bit i % 8 of byte i // 8 = mask.flatten()[i]`.

    Args:
        mask: bool, any shape, any strides.

    Returns:
        uint8 `[ceil(numel / 8)]`, little-endian bit order, row-major, spare bits zero.

    Example:
        >>> import torch
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    mask = of_gpu_array(mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"pack_mask: mask must be a bool tensor, got {mask.dtype}; use mask != 0")
    return torch.ops.paikern.pack_mask(mask)
