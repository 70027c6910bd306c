"""apply_mask_: zero the pruned weights in place."""

from __future__ import annotations

import torch
from torch import Tensor

from paikern.ops._library import define, fake, of_gpu_array
from paikern.ops.unpack_mask import check_packed

define("apply_mask_(Tensor(a!) tensor, Tensor packed) -> ()")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@fake("apply_mask_")
def _shape(tensor: Tensor, packed: Tensor) -> None:
    return None


def apply_mask_(tensor: Tensor, packed: Tensor) -> Tensor:
    """`tensor.masked_fill_(~unpack_mask(packed, tensor.shape), 0)`, without the float mask.

    What lies under the mask becomes +0 whatever it was, NaN and infinity included.

    Args:
        tensor: float32, float16, bfloat16 or float64, any strides; written in place.
        packed: uint8 bits in row-major order of `tensor`.

    Returns:
        `tensor`.

    Example:
        >>> import torch
        >>> apply_mask_(torch.ones(3), torch.tensor([5], dtype=torch.uint8))
        tensor([1., 0., 1.])
    """
    tensor, packed = of_gpu_array(tensor), of_gpu_array(packed)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"apply_mask_: tensor must be a float tensor, got {tensor.dtype}")
    check_packed("apply_mask_", packed, tensor.numel())
    with torch.no_grad():
        torch.ops.paikern.apply_mask_(tensor, packed)
    if not torch.compiler.is_compiling():
        # So that a backward pass that saved the old values fails, as after torch's own writes.
        torch.autograd.graph.increment_version(tensor)
    return tensor
