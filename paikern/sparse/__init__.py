"""Pruned weights stored without what was pruned."""

from paikern.sparse.packed_weight import PackedWeight, dense_keys, pack_keys

__all__ = ["PackedWeight", "dense_keys", "pack_keys"]
