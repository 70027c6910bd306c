"""The same masks on every process of a distributed run."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

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
    if _alone():
        return masks
    first = {name: masks.packed(name).cpu() for name in masks}
    packed, metadata = _of_the_first((first, masks.metadata))
    return MaskSet(packed, masks.shapes, metadata)


def agreed_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the first process, on the CPU in a distributed run."""
    if _alone():
        return tensors
    found: dict[str, Tensor] = _of_the_first({name: t.cpu() for name, t in tensors.items()})
    return found


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _of_the_first(value: Any) -> Any:
    sent = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, src=0)
    assert sent[0] is not None
    return sent[0]
