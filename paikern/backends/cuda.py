"""The CUDA backend: tensors -> device pointers and torch's current stream -> `paikern._cuda`.

Operations have checked their arguments; here they are made contiguous and their addresses taken.
Calls return before the device is done, in the order of the stream, as torch's own do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _cuda

__all__ = ["apply_mask_", "device_count", "pack_mask", "unpack_mask"]


def device_count() -> tuple[int, str]:
    """How many devices CUDA finds, and its reason if that is none."""
    return _cuda.device_count()


def _where(tensor: Tensor) -> tuple[int, int]:
    """Device number and address of the current stream there."""
    device = tensor.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


def pack_mask(mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    packed = mask.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    with torch.cuda.device_of(mask):
        _cuda.pack_mask(mask.data_ptr(), mask.numel(), packed.data_ptr(), *_where(mask))
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    packed = packed.contiguous()
    mask = packed.new_empty(tuple(shape), dtype=torch.bool)
    with torch.cuda.device_of(packed):
        _cuda.unpack_mask(packed.data_ptr(), mask.numel(), mask.data_ptr(), *_where(packed))
    return mask


def apply_mask_(tensor: Tensor, packed: Tensor) -> None:
    if not tensor.is_contiguous():
        copy = tensor.contiguous()
        apply_mask_(copy, packed)
        tensor.copy_(copy)
        return
    packed = packed.contiguous()
    with torch.cuda.device_of(tensor):
        _cuda.apply_mask(
            tensor.data_ptr(), tensor.element_size(), tensor.numel(), packed.data_ptr(),
            *_where(tensor),
        )  # fmt: skip
