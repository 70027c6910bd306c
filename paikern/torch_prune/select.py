"""Which weights stay, as bits; `kept` are the bits of what is left so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paikern import ops
from paikern.ops.unpack_mask import count_kept
from paikern.torch_prune.amounts import (
    _validate_pruning_dim,
    _validate_structured_pruning,
    removed_of,
)

__all__ = ["all_ones", "count", "keep_channels", "keep_largest", "keep_random"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Kept = Sequence[Tensor | None]


def count(bits: Tensor | None, numel: int) -> int:
    """How many weights are left.

    >>> count(torch.tensor([5], dtype=torch.uint8), 3), count(None, 3)
    (2, 3)
    """
    return numel if bits is None else count_kept(bits)


def all_ones(numel: int, device: torch.device) -> Tensor:
    """The bits of a mask that keeps all: spare bits are zero.

    >>> all_ones(11, torch.device("cpu"))
    tensor([255,   7], dtype=torch.uint8)
    """
    bits = torch.full(((numel + 7) // 8,), 255, dtype=torch.uint8, device=device)
    if numel % 8:
        bits[-1] = (1 << numel % 8) - 1
    return bits


def keep_largest(
    scores: Sequence[Tensor], kept: Kept, amount: Any, names: Sequence[str]
) -> list[Tensor]:
    """Remove `amount` of what is left: the smallest magnitudes over all tensors together.

    Ties keep the lower index. Scores are read in place, but for integers and complex numbers.

    Args:
        scores: tensors of any shapes.
        kept: bits, or None where all is left; one for each.
        amount: int or float, see `removed_of`.
        names: of the tensors, for errors.

    Raises:
        NonFiniteScoreError: NaN in what is left, naming the tensor.

    >>> keep_largest([torch.tensor([3.0, -1.0, 2.0])], [None], 1, ["w"])
    [tensor([5], dtype=torch.uint8)]
    """
    total = sum(count(bits, s.numel()) for s, bits in zip(scores, kept, strict=True))
    k = total - removed_of(amount, total)
    tensors = [_rankable(s.detach()) for s in scores]
    masks = kept if any(bits is not None for bits in kept) else None
    return ops.topk_mask(tensors, k, absolute=True, masks=masks, names=names)


def keep_random(like: Sequence[Tensor], kept: Kept, amount: Any) -> list[Tensor]:
    """Remove `amount` of what is left over all tensors together, each with the same chance.

    The random numbers are those that torch's own pruning draws in float32 and float64, so the same
    seed gives the same mask (up to ties, of which float32 has one in 2^24).
    """
    counts = [count(bits, t.numel()) for t, bits in zip(like, kept, strict=True)]
    total = sum(counts)
    removed = removed_of(amount, total)
    if removed:
        dtype = like[0].dtype if like[0].dtype == torch.float64 else torch.float32
        draw = torch.rand(total, dtype=dtype, device=like[0].device).neg_()
        chosen = ops.unpack_mask(ops.topk_mask(draw, total - removed)[0], (total,))
    else:
        chosen = torch.ones(total, dtype=torch.bool, device=like[0].device)
    parts = chosen.split(counts)
    return [_spread(p, t, bits) for p, t, bits in zip(parts, like, kept, strict=True)]


def keep_channels(
    t: Tensor,
    kept: Tensor | None,
    amount: Any,
    dim: int,
    scores: Callable[[Tensor], Tensor],
    name: str,
) -> Tensor:
    """Remove `amount` of the channels along `dim` that still have a weight.

    Args:
        t: the weight or its importance.
        kept: its bits, or None.
        scores: from what is left of `t`, `[..., channels, ...]`, the scores `[channels]`: the
            largest stay, ties keep the lower index.
        name: of the weight, for errors.

    Raises:
        ValueError: fewer than two dimensions, or an amount above the number of channels.
        IndexError: no such dimension.
        NonFiniteScoreError: a score is NaN.
    """
    _validate_structured_pruning(t)
    _validate_pruning_dim(t, dim)
    dim %= t.dim()
    before = None if kept is None else ops.unpack_mask(kept, t.shape)
    alive = torch.ones(t.shape[dim], dtype=torch.bool, device=t.device)  # [channels]
    if before is not None:
        others = [d for d in range(t.dim()) if d != dim]
        alive = before.sum(others) != 0
    left = int(alive.sum())
    removed = removed_of(amount, left)
    if removed == 0:
        return all_ones(t.numel(), t.device) if kept is None else kept
    part = t.detach()
    if left < part.shape[dim]:
        part = part.index_select(dim, alive.nonzero()[:, 0])
    bits = ops.topk_mask(scores(part), left - removed, names=[f"the channels of {name}"])[0]
    chosen = ops.unpack_mask(bits, (left,)).to(t.device)
    channels = torch.zeros_like(alive).masked_scatter_(alive, chosen)
    shape = [1] * t.dim()
    shape[dim] = -1
    mask = channels.reshape(shape).expand(t.shape)
    return ops.pack_mask(mask if before is None else mask & before)


def _rankable(t: Tensor) -> Tensor:
    """Something whose magnitudes rank as those of `t` do, in a dtype that selection takes."""
    if t.dtype in _FLOATS:
        return t
    return t.abs() if t.is_complex() else t.double()


def _spread(chosen: Tensor, t: Tensor, kept: Tensor | None) -> Tensor:
    """The bits of a choice `[left]` among what is left of `t`."""
    if kept is None:
        return ops.pack_mask(chosen)
    before = ops.unpack_mask(kept, (t.numel(),))
    return ops.pack_mask(torch.zeros_like(before).masked_scatter_(before, chosen))
