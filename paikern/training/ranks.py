"""The same masks on every process of a distributed run."""

from __future__ import annotations

import torch.distributed as dist

from paikern.masks import MaskSet


def agreed(masks: MaskSet) -> MaskSet:
    """The masks of the first process; every process must call this.

    Each process scores with its own share of the data, so that their own masks would differ and
    the averaged gradients would train weights that others have pruned.

    Example:
        >>> import torch
        >>> masks = MaskSet.from_bool({"w": torch.tensor([True, False])})
        >>> agreed(masks) is masks  # no distributed run
        True
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return masks
    first = {name: masks.packed(name).cpu() for name in masks}
    sent = [(first, masks.metadata) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0)
    assert sent[0] is not None
    return MaskSet(sent[0][0], masks.shapes, sent[0][1])
