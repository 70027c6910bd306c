"""pack_mask, unpack_mask, apply_mask_.

Eight elements a byte, the first the lowest bit, spare bits zero; `numel` elements, row-major.
Bytes moved: numel + numel / 8 for packing and unpacking. Applying reads numel / 8 and writes zeros
to what is pruned, so that it never reads the tensor. Limit: memory bandwidth.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.tiles import lines, packed, unpacked


@triton.jit
def pack_mask_kernel(mask, out, numel, ROWS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    local, byte = lines(ROWS), tl.arange(0, ROWS)
    left = numel - start
    bits = tl.load(mask + start + local, mask=local < left, other=0) != 0
    tl.store(out + start // 8 + byte, packed(bits), mask=byte * 8 < left)


@triton.jit
def unpack_mask_kernel(mask, out, numel, ROWS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    local, left = lines(ROWS), numel - start
    bits = unpacked(mask, start, left, ROWS)
    tl.store(out + start + local, bits.to(tl.uint8), mask=local < left)


@triton.jit
def apply_mask_kernel(tensor, mask, numel, ROWS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (8 * ROWS)
    local, left = lines(ROWS), numel - start
    pruned = (unpacked(mask, start, left, ROWS) == 0) & (local < left)
    zero = tl.zeros([ROWS, 8], dtype=tensor.dtype.element_ty)
    tl.store(tensor + start + local, zero, mask=pruned)


def _grid(numel: int) -> tuple[int]:
    return (blocks(numel, 8 * config().flat.rows),)


def pack_mask(mask: Tensor) -> Tensor:
    held = mask.contiguous().view(torch.uint8)
    out = held.new_empty((mask.numel() + 7) // 8)
    rows, warps = config().flat
    numel = mask.numel()
    launch(pack_mask_kernel, _grid(numel), held, held, out, numel, ROWS=rows, warps=warps)
    return out


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    held, numel = packed.contiguous(), math.prod(shape)
    out = held.new_empty(numel)
    rows, warps = config().flat
    launch(unpack_mask_kernel, _grid(numel), held, held, out, numel, ROWS=rows, warps=warps)
    return out.view(torch.bool).reshape(tuple(shape))


def apply_mask_(tensor: Tensor, packed: Tensor) -> None:
    if not tensor.is_contiguous():
        copy = tensor.contiguous()
        apply_mask_(copy, packed)
        tensor.copy_(copy)
        return
    rows, warps = config().flat
    held, bits = tensor.detach(), packed.contiguous()
    numel = tensor.numel()
    launch(apply_mask_kernel, _grid(numel), held, held, bits, numel, ROWS=rows, warps=warps)
