"""The reference backend of structured masks: sorts, and sums in the order that is promised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.blocks import blocks_of, matrix_of
from paikern.backends.errors import refuse_nan


def nm_mask(
    scores: Sequence[Tensor], n: int, m: int, dims: Sequence[int], absolute: bool
) -> list[Tensor]:
    from paikern.backends import reference

    values = [s.detach().double() for s in scores]
    if absolute:
        values = [v.abs() for v in values]
    nan = (i for i, v in enumerate(values) if bool(torch.isnan(v).any()))
    refuse_nan("nm_mask", next(nan, -1))
    kept = [_best_of_groups(v, n, m, dim) for v, dim in zip(values, dims, strict=True)]
    return [reference.pack_mask(mask) for mask in kept]


def _best_of_groups(values: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Bool, in the shape of `values`."""
    last = values.movedim(dim, -1) + 0.0  # -0 becomes +0
    whole = last.shape[-1] // m * m
    groups = last[..., :whole].unflatten(-1, (-1, m)) if whole else last[..., :0].unsqueeze(-1)
    rest = last[..., whole:]
    kept = torch.cat(
        [_best(groups, n).flatten(-2), _best(rest, (rest.shape[-1] * n + m - 1) // m)], -1
    )
    return kept.movedim(-1, dim)


def _best(values: Tensor, k: int) -> Tensor:
    """The k largest along the last dimension, the lower index first on ties."""
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    kept = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    return kept.scatter_(-1, order[..., :k], True)


def nm_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    n: int,
    m: int,
    dims: Sequence[int],
    power: int,
) -> list[Tensor]:
    scores = [
        _factored(w, ai, gi, mask, power)
        for w, ai, gi, mask in zip(weights, a, g, masks, strict=True)
    ]
    return nm_mask(scores, n, m, dims, False)


def _factored(weight: Tensor, a: Tensor, g: Tensor, mask: Tensor, power: int) -> Tensor:
    from paikern.backends import reference

    score = reference.factored_score(weight, a, g, power)
    if mask.numel():
        score.masked_fill_(~reference.unpack_mask(mask, score.shape), -1.0)
    return score


def block_means(scores: Tensor, block: Sequence[int], absolute: bool) -> Tensor:
    rows, columns = matrix_of(scores.shape)
    (down, across), (high, wide) = blocks_of(scores.shape, block), block
    values = scores.detach().double().reshape(rows, columns)
    values = values.abs() if absolute else values
    counts = _cut(torch.ones_like(values), down, high, across, wide).sum((1, 3, 4))
    lines = _cut(values, down, high, across, wide)  # [down, high, across, wide / 8, 8]
    lanes = torch.zeros(down, across, 8, dtype=torch.float64, device=values.device)
    for row in range(lines.shape[1]):
        for step in range(lines.shape[3]):
            lanes += lines[:, row, :, step]
    total = lanes[..., 0].clone()
    for lane in range(1, 8):
        total += lanes[..., lane]
    means = total / counts
    refuse_nan("block_means", 0 if bool(torch.isnan(means).any()) else -1)
    return means


def _cut(values: Tensor, down: int, high: int, across: int, wide: int) -> Tensor:
    """Blocks filled up with zeros, their rows in steps of eight: a zero changes no sum."""
    rows, columns = values.shape
    whole = torch.nn.functional.pad(values, (0, across * wide - columns, 0, down * high - rows))
    blocks = torch.nn.functional.pad(whole.reshape(down, high, across, wide), (0, -wide % 8))
    return blocks.unflatten(-1, (-1, 8))


def block_means_factored(
    weight: Tensor, a: Tensor, g: Tensor, mask: Tensor, block: Sequence[int], power: int
) -> Tensor:
    return block_means(_factored(weight, a, g, mask, power), block, False)


def expand_blocks(packed: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    from paikern.backends import reference

    rows, columns = matrix_of(shape)
    blocks = reference.unpack_mask(packed, blocks_of(shape, block))
    whole = blocks.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return reference.pack_mask(whole[:rows, :columns])
