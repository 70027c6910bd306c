"""Pruned weights stored without what was pruned."""

from paikern.sparse._keys import dense_keys
from paikern.sparse.in_models import pack_keys
from paikern.sparse.masked_conv2d import MaskedConv2d
from paikern.sparse.masked_linear import MaskedConv1D, MaskedLinear
from paikern.sparse.packed_weight import PackedWeight

__all__ = [
    "MaskedConv1D",
    "MaskedConv2d",
    "MaskedLinear",
    "PackedWeight",
    "dense_keys",
    "pack_keys",
]
