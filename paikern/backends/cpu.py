"""The CPU backend: tensors -> pointers -> `paikern._C`.

Operations have checked their arguments; here they are made contiguous and their addresses taken.
torch is imported first so that one OpenMP runtime serves both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _C
from paikern.backends.cpu_maps import live_nodes, map_maximum, map_scale_, through_maximum_
from paikern.backends.cpu_path import (
    dpai_step_,
    dpai_update_,
    path_backward,
    path_conv_backward,
    path_conv_forward,
    path_conv_score,
    path_forward,
    path_score,
)
from paikern.backends.errors import refuse_nan

__all__ = [
    "apply_mask_",
    "dpai_step_",
    "dpai_update_",
    "isa",
    "kth_largest",
    "live_nodes",
    "map_maximum",
    "map_scale_",
    "pack_mask",
    "path_backward",
    "path_conv_backward",
    "path_conv_forward",
    "path_conv_score",
    "path_forward",
    "path_score",
    "takes",
    "through_maximum_",
    "topk_mask",
    "topk_mask_factored",
    "unpack_mask",
]

_FLOAT64 = (
    "apply_mask_",
    "kth_largest",
    "pack_mask",
    "topk_mask",
    "topk_mask_factored",
    "unpack_mask",
)
_SCORE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def isa() -> str:
    """Instruction set in use: portable, avx2 or avx512."""
    return _C.isa()


def takes(operation: str, float64: bool) -> bool:
    """The native kernels over maps and weights are float32; selection and masks take float64."""
    return not float64 or operation in _FLOAT64


def pack_mask(mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    packed = torch.empty((mask.numel() + 7) // 8, dtype=torch.uint8)
    _C.pack_mask(mask.data_ptr(), mask.numel(), packed.data_ptr())
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    packed = packed.contiguous()
    mask = torch.empty(tuple(shape), dtype=torch.bool)
    _C.unpack_mask(packed.data_ptr(), mask.numel(), mask.data_ptr())
    return mask


def apply_mask_(tensor: Tensor, packed: Tensor) -> None:
    if not tensor.is_contiguous():
        copy = tensor.contiguous()
        apply_mask_(copy, packed)
        tensor.copy_(copy)
        return
    packed = packed.contiguous()
    _C.apply_mask(tensor.data_ptr(), tensor.element_size(), tensor.numel(), packed.data_ptr())


def _bits_for(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty((t.numel() + 7) // 8, dtype=torch.uint8) for t in tensors]


def topk_mask(
    scores: Sequence[Tensor], k: Sequence[int], exponents: Sequence[int], absolute: bool
) -> list[Tensor]:
    held = [s.detach().contiguous() for s in scores]
    bits = _bits_for(held)
    shifts = exponents or [0] * len(held)
    rows = [
        (s.data_ptr(), _SCORE_TYPES[s.dtype], s.numel(), e, b.data_ptr())
        for s, e, b in zip(held, shifts, bits, strict=True)
    ]
    refuse_nan("topk_mask", _C.topk_mask(rows, list(k), absolute))
    return bits


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    exponents: Sequence[int],
    k: Sequence[int],
    power: int,
) -> list[Tensor]:
    held = [w.detach().contiguous() for w in weights]
    left = [t.float().contiguous() for t in a]
    right = [t.float().contiguous() for t in g]
    candidates = [m.contiguous() for m in masks]
    bits = _bits_for(held)
    rows = [
        (
            w.data_ptr(),
            _SCORE_TYPES[w.dtype],
            w.shape[0],
            w.shape[1],
            e,
            x.data_ptr(),
            y.data_ptr(),
            m.data_ptr() if m.numel() else 0,
            b.data_ptr(),
        )
        for w, x, y, m, e, b in zip(held, left, right, candidates, exponents, bits, strict=True)
    ]
    refuse_nan("topk_mask_factored", _C.topk_mask_factored(rows, list(k), power))
    return bits


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    held = [s.detach().contiguous() for s in scores]
    rows = [(s.data_ptr(), _SCORE_TYPES[s.dtype], s.numel(), 0, 0) for s in held]
    value, nan = _C.kth_largest(rows, k)
    refuse_nan("kth_largest", nan)
    return torch.tensor(value, dtype=torch.float64)
