"""masked_conv2d on an NVIDIA GPU: the library convolves a weight made dense for the call."""

from __future__ import annotations

from paikern.backends.cuda_positions import gather_kept, scatter_kept
from paikern.backends.dense_masked_conv import operations

__all__ = ["masked_conv2d", "masked_conv2d_input", "masked_conv2d_kept"]

masked_conv2d, masked_conv2d_input, masked_conv2d_kept = operations(scatter_kept, gather_kept)
