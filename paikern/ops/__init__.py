"""The operations: one file each with docstring, schema, shape function and derivative."""

from paikern.ops.apply_mask import apply_mask_
from paikern.ops.balanced_mask import balanced_mask
from paikern.ops.block_means import block_means, block_means_factored
from paikern.ops.dpai_step import dpai_step_, dpai_update_
from paikern.ops.expand_blocks import expand_blocks
from paikern.ops.kth_largest import kth_largest
from paikern.ops.maps import live_nodes, map_maximum, map_scale, through_maximum
from paikern.ops.masked_conv2d import masked_conv2d
from paikern.ops.masked_linear import masked_linear
from paikern.ops.nm_mask import nm_mask
from paikern.ops.nm_mask_factored import nm_mask_factored
from paikern.ops.pack_mask import pack_mask
from paikern.ops.path_backward import path_backward
from paikern.ops.path_conv_backward import path_conv_backward
from paikern.ops.path_conv_forward import path_conv_forward
from paikern.ops.path_conv_score import path_conv_score
from paikern.ops.path_forward import path_forward
from paikern.ops.path_score import path_score
from paikern.ops.path_sweep import path_sweep
from paikern.ops.phew_keep import phew_keep_
from paikern.ops.phew_tables import phew_tables
from paikern.ops.phew_walks import phew_walks
from paikern.ops.positions import list_positions, transpose_positions
from paikern.ops.scatter_kept import gather_kept, scatter_kept
from paikern.ops.topk_mask import topk_mask
from paikern.ops.topk_mask_factored import topk_mask_factored
from paikern.ops.topk_mask_product import topk_mask_product
from paikern.ops.unpack_mask import unpack_mask

__all__ = [
    "apply_mask_",
    "balanced_mask",
    "block_means",
    "block_means_factored",
    "dpai_step_",
    "dpai_update_",
    "expand_blocks",
    "gather_kept",
    "kth_largest",
    "live_nodes",
    "list_positions",
    "map_maximum",
    "map_scale",
    "masked_conv2d",
    "masked_linear",
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
    "through_maximum",
    "topk_mask",
    "topk_mask_factored",
    "topk_mask_product",
    "transpose_positions",
    "unpack_mask",
]
