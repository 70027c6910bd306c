"""The CPU backend: tensors -> pointers -> `paikern._C`.

Operations have checked their arguments; here their addresses are taken.
torch is imported first so that one OpenMP runtime serves both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paikern import _C
from paikern.backends.cpu_balanced_mask import balanced_mask
from paikern.backends.cpu_flow import (
    dpai_loop,
    path_flow,
    path_geometry,
    path_rounds,
    weight_type,
)
from paikern.backends.cpu_gated import gated_program
from paikern.backends.cpu_maps import live_nodes, map_maximum, map_scale_, through_maximum_
from paikern.backends.cpu_masked_conv import (
    masked_conv2d,
    masked_conv2d_input,
    masked_conv2d_kept,
)
from paikern.backends.cpu_masked_linear import (
    gather_kept,
    list_positions,
    masked_linear,
    masked_linear_input,
    masked_linear_kept,
    scatter_kept,
    transpose_positions,
)
from paikern.backends.cpu_path import (
    dpai_step_,
    dpai_update_,
    path_backward,
    path_conv_backward,
    path_conv_forward,
    path_conv_score,
    path_forward,
    path_score,
    path_sweep,
    score_geometry,
)
from paikern.backends.cpu_patterns import (
    block_means,
    block_means_factored,
    expand_blocks,
    nm_mask,
    nm_mask_factored,
)
from paikern.backends.cpu_phew import phew_keep_, phew_tables, phew_walks
from paikern.backends.errors import refuse_nan

__all__ = [
    "apply_mask_",
    "balanced_mask",
    "block_means",
    "block_means_factored",
    "dpai_loop",
    "dpai_step_",
    "dpai_update_",
    "expand_blocks",
    "gated_program",
    "gather_kept",
    "isa",
    "kth_largest",
    "list_positions",
    "live_nodes",
    "map_maximum",
    "map_scale_",
    "masked_conv2d",
    "masked_conv2d_input",
    "masked_conv2d_kept",
    "masked_linear",
    "masked_linear_input",
    "masked_linear_kept",
    "nm_mask",
    "nm_mask_factored",
    "pack_mask",
    "path_backward",
    "path_conv_backward",
    "path_conv_forward",
    "path_conv_score",
    "path_flow",
    "path_forward",
    "path_geometry",
    "path_rounds",
    "path_score",
    "path_sweep",
    "phew_keep_",
    "phew_tables",
    "phew_walks",
    "scatter_kept",
    "takes",
    "through_maximum_",
    "topk_mask",
    "topk_mask_factored",
    "topk_mask_product",
    "transpose_positions",
    "unpack_mask",
    "weight_type",
]

_FLOAT64 = (
    "apply_mask_",
    "balanced_mask",
    "block_means",
    "block_means_factored",
    "expand_blocks",
    "gather_kept",
    "kth_largest",
    "list_positions",
    "nm_mask",
    "nm_mask_factored",
    "pack_mask",
    "phew_keep_",
    "phew_tables",
    "phew_walks",
    "scatter_kept",
    "topk_mask",
    "topk_mask_factored",
    "topk_mask_product",
    "transpose_positions",
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


def topk_mask(
    scores: Sequence[Tensor],
    k: Sequence[int],
    exponents: Sequence[int],
    absolute: bool,
    masks: Sequence[Tensor],
    memory: Tensor | None,
) -> list[Tensor]:
    bits = [torch.empty((s.numel() + 7) >> 3, dtype=torch.uint8) for s in scores]
    shifts = exponents or _zeros(len(scores))
    held = [m.contiguous() for m in masks]
    candidates = [m.data_ptr() for m in held] or _zeros(len(scores))
    rows = [
        (_view(s), s.numel(), e, c, b.data_ptr())
        for s, e, c, b in zip(scores, shifts, candidates, bits, strict=True)
    ]
    if memory is None:
        refuse_nan("topk_mask", _C.topk_mask(rows, list(k), absolute, 0))
        return bits
    new = memory.clone()
    refuse_nan("topk_mask", _C.topk_mask(rows, list(k), absolute, new.data_ptr()))
    return [*bits, new]


def topk_mask_product(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: Sequence[int],
) -> list[Tensor]:
    bits = [torch.empty((w.numel() + 7) >> 3, dtype=torch.uint8) for w in weights]
    held = [m.contiguous() for m in masks]
    candidates = [m.data_ptr() for m in held] or _zeros(len(weights))
    rows = [
        (_view(w), _view(g), w.numel(), c, b.data_ptr())
        for w, g, c, b in zip(weights, gradients, candidates, bits, strict=True)
    ]
    refuse_nan("topk_mask_product", _C.topk_mask_product(rows, list(k)))
    return bits


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    exponents: Sequence[int],
    k: Sequence[int],
    power: int,
    convs: Sequence[int],
) -> list[Tensor]:
    left = [t.float().contiguous() for t in a]
    right = [t.float().contiguous() for t in g]
    bits = [torch.empty((w.numel() + 7) >> 3, dtype=torch.uint8) for w in weights]
    packed = [m.contiguous() for m in masks]
    candidates = [m.data_ptr() for m in packed] or _zeros(len(weights))
    # Tiles read whole rows of the weight as it is stored.
    held = [w if x.dim() == 1 else w.contiguous() for w, x in zip(weights, left, strict=True)]
    shapes = iter(convs)
    rows: list[Any] = []
    for w, x, y, c, e, b in zip(held, left, right, candidates, exponents, bits, strict=True):
        if x.dim() == 1:
            rows.append((_view(w), *w.shape, e, x.data_ptr(), y.data_ptr(), c, b.data_ptr()))
        else:
            geometry = score_geometry(w, x, shapes)
            rows.append(
                (
                    geometry,
                    w.data_ptr(),
                    _SCORE_TYPES[w.dtype],
                    e,
                    x.data_ptr(),
                    y.data_ptr(),
                    c,
                    b.data_ptr(),
                )
            )
    refuse_nan("topk_mask_factored", _C.topk_mask_factored(rows, list(k), power))
    return bits


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    rows = [(_view(s), s.numel(), 0, 0, 0) for s in scores]
    value, nan = _C.kth_largest(rows, k)
    refuse_nan("kth_largest", nan)
    return torch.tensor(value, dtype=torch.float64)


def _view(tensor: Tensor) -> tuple[int, int, tuple[tuple[int, ...], tuple[int, ...]] | None]:
    """Where a tensor lies, its type, and its layout unless it is contiguous. Never a copy."""
    layout = None if tensor.is_contiguous() else (tuple(tensor.shape), tensor.stride())
    return tensor.data_ptr(), _SCORE_TYPES[tensor.dtype], layout


@functools.lru_cache
def _zeros(count: int) -> tuple[int, ...]:
    return (0,) * count
