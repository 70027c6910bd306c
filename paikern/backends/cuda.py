"""The CUDA backend: tensors -> device pointers and torch's current stream -> kernels by name.

Operations have checked their arguments; here they are made contiguous and their addresses taken.
Calls return before the device is done, in the order of the stream, as torch's own do; those that
refuse NaN wait once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.cuda_balanced_mask import balanced_mask
from paikern.backends.cuda_dpai import dpai_step_, dpai_update_
from paikern.backends.cuda_launch import current as kernel_provider
from paikern.backends.cuda_launch import elementwise, run
from paikern.backends.cuda_maps import live_nodes, map_maximum, map_scale_, through_maximum_
from paikern.backends.cuda_masked_conv import (
    masked_conv2d,
    masked_conv2d_input,
    masked_conv2d_kept,
)
from paikern.backends.cuda_masked_linear import (
    masked_linear,
    masked_linear_input,
    masked_linear_kept,
)
from paikern.backends.cuda_path import (
    path_backward,
    path_conv_backward,
    path_conv_forward,
    path_conv_score,
    path_forward,
    path_score,
    path_sweep,
)
from paikern.backends.cuda_patterns import (
    block_means,
    block_means_factored,
    expand_blocks,
    nm_mask,
    nm_mask_factored,
)
from paikern.backends.cuda_phew import phew_keep_, phew_tables, phew_walks
from paikern.backends.cuda_positions import (
    gather_kept,
    list_positions,
    scatter_kept,
    transpose_positions,
)
from paikern.backends.cuda_select import (
    kth_largest,
    topk_mask,
    topk_mask_factored,
    topk_mask_product,
)

__all__ = [
    "apply_mask_",
    "balanced_mask",
    "block_means",
    "block_means_factored",
    "dpai_step_",
    "dpai_update_",
    "expand_blocks",
    "gather_kept",
    "kernel_provider",
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
    "path_forward",
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
]

# In float64 they are the reference's.
_FLOAT32_ONLY = ("path_", "map_", "live_nodes", "through_maximum_", "dpai_", "masked_")


def takes(operation: str, float64: bool) -> bool:
    """Whether an operation takes float64 tensors: selections round them or hand them on."""
    return not float64 or not operation.startswith(_FLOAT32_ONLY)


def pack_mask(mask: Tensor) -> Tensor:
    mask = mask.contiguous()
    count = mask.numel()
    packed = mask.new_empty((count + 7) // 8, dtype=torch.uint8)
    arguments = (mask.data_ptr(), count, packed.data_ptr())
    run(mask, [elementwise("paikern_pack_mask", count, *arguments)])
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    packed = packed.contiguous()
    mask = packed.new_empty(tuple(shape), dtype=torch.bool)
    count = mask.numel()
    arguments = (packed.data_ptr(), count, mask.data_ptr())
    run(packed, [elementwise("paikern_unpack_mask", count, *arguments)])
    return mask


def apply_mask_(tensor: Tensor, packed: Tensor) -> None:
    if not tensor.is_contiguous():
        copy = tensor.contiguous()
        apply_mask_(copy, packed)
        tensor.copy_(copy)
        return
    packed = packed.contiguous()
    count = tensor.numel()
    kernel = f"paikern_apply_mask_{8 * tensor.element_size()}"
    run(tensor, [elementwise(kernel, count, tensor.data_ptr(), count, packed.data_ptr())])
