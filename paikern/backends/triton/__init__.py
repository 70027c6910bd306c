"""The Triton backend: the same operations on NVIDIA and AMD GPUs, without a CUDA compiler.

Arithmetic is float32 whatever the storage type, offsets are int64, masks are read as bits. float64
is the reference backend's. With TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

from paikern.backends.triton.balanced import balanced_mask
from paikern.backends.triton.bits import apply_mask_, pack_mask, unpack_mask
from paikern.backends.triton.config import interpreting
from paikern.backends.triton.dpai import dpai_step_, dpai_update_
from paikern.backends.triton.maps import live_nodes, map_maximum, map_scale_, through_maximum_
from paikern.backends.triton.masked import (
    masked_linear,
    masked_linear_input,
    masked_linear_kept,
)
from paikern.backends.triton.masked_conv import (
    masked_conv2d,
    masked_conv2d_input,
    masked_conv2d_kept,
)
from paikern.backends.triton.masked_words import (
    gather_kept,
    list_positions,
    scatter_kept,
    transpose_positions,
)
from paikern.backends.triton.patterns import (
    block_means,
    block_means_factored,
    expand_blocks,
    nm_mask,
    nm_mask_factored,
)
from paikern.backends.triton.phew import phew_keep_, phew_tables
from paikern.backends.triton.products import (
    path_backward,
    path_conv_backward,
    path_conv_forward,
    path_conv_score,
    path_forward,
    path_score,
)
from paikern.backends.triton.selection import (
    kth_largest,
    topk_mask,
    topk_mask_factored,
    topk_mask_product,
)
from paikern.backends.triton.sweeps import path_sweep
from paikern.backends.triton.walks import phew_walks

__all__ = [
    "apply_mask_",
    "balanced_mask",
    "block_means",
    "block_means_factored",
    "dpai_step_",
    "dpai_update_",
    "expand_blocks",
    "gather_kept",
    "interpreting",
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

_FLOAT64 = (
    "apply_mask_", "balanced_mask", "gather_kept", "pack_mask", "phew_keep_", "phew_tables",
    "phew_walks", "scatter_kept", "topk_mask", "unpack_mask",
)  # fmt: skip


def takes(operation: str, float64: bool) -> bool:
    """Masks apply to any type, values are moved as bits; `topk_mask` passes float64 scores on."""
    return not float64 or operation in _FLOAT64
