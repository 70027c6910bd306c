"""The reference backend: every operation in plain PyTorch, obviously right, any float dtype.

It is the last fallback on every device and the truth that the kernels are tested against.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paikern.backends.errors import refuse_nan
from paikern.backends.reference_balanced_mask import balanced_mask
from paikern.backends.reference_maps import (
    live_nodes,
    map_maximum,
    map_scale_,
    through_maximum_,
)
from paikern.backends.reference_masked_conv import (
    masked_conv2d,
    masked_conv2d_input,
    masked_conv2d_kept,
)
from paikern.backends.reference_masked_linear import (
    gather_kept,
    list_positions,
    masked_linear,
    masked_linear_input,
    masked_linear_kept,
    scatter_kept,
    transpose_positions,
)
from paikern.backends.reference_path import (
    dpai_step_,
    dpai_update_,
    path_backward,
    path_conv_backward,
    path_conv_forward,
    path_conv_score,
    path_forward,
    path_score,
    path_sweep,
)
from paikern.backends.reference_patterns import (
    block_means,
    block_means_factored,
    expand_blocks,
    nm_mask,
    nm_mask_factored,
)
from paikern.backends.reference_phew import phew_keep_, phew_tables, phew_walks

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
    "through_maximum_",
    "topk_mask",
    "topk_mask_factored",
    "topk_mask_product",
    "transpose_positions",
    "unpack_mask",
]


def pack_mask(mask: Tensor) -> Tensor:
    bits = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(
        1, dtype=torch.uint8
    )


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.reshape(-1)[: math.prod(shape)].bool().reshape(tuple(shape))


def apply_mask_(tensor: Tensor, packed: Tensor) -> None:
    tensor.masked_fill_(~unpack_mask(packed, tensor.shape), 0)


class _Order(NamedTuple):
    """`level` then `mantissa` sort like value * 2**exponent, whatever the exponent."""

    level: Tensor
    mantissa: Tensor


def _order(tensor: Tensor, exponent: int = 0) -> _Order:
    values = tensor.detach().reshape(-1).double()
    mantissa, power = torch.frexp(values)  # 0.5 <= |mantissa| < 1
    level = torch.sign(values).long() * (power.long() + exponent + 2**40)
    infinite = torch.isinf(values)
    level[infinite] = torch.sign(values[infinite]).long() * 2**62
    return _Order(level, torch.where(infinite, 0.0, mantissa + 0.0))  # -0 becomes +0


def _ranked(order: _Order) -> Tensor:
    """Indices, the highest first, lower index first on ties."""
    by_mantissa = torch.sort(order.mantissa, descending=True, stable=True).indices
    by_level = torch.sort(order.level[by_mantissa], descending=True, stable=True).indices
    return by_mantissa[by_level]


def _keep(orders: list[_Order], k: Sequence[int]) -> list[Tensor]:
    if len(k) == 1 and len(orders) != 1:
        both = _Order(torch.cat([o.level for o in orders]), torch.cat([o.mantissa for o in orders]))
        chosen = torch.zeros(both.level.numel(), dtype=torch.bool, device=both.level.device)
        chosen[_ranked(both)[: k[0]]] = True
        return [pack_mask(part) for part in chosen.split([o.level.numel() for o in orders])]
    masks = []
    for order, count in zip(orders, k, strict=True):
        chosen = torch.zeros(order.level.numel(), dtype=torch.bool, device=order.level.device)
        chosen[_ranked(order)[:count]] = True
        masks.append(pack_mask(chosen))
    return masks


def _first_nan(tensors: Sequence[Tensor]) -> int:
    return next((i for i, t in enumerate(tensors) if bool(torch.isnan(t).any())), -1)


def _candidates(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """The scores with -infinity for those that a mask excludes."""
    if not masks:
        return list(scores)
    return [
        s if m.numel() == 0 else s.masked_fill(~unpack_mask(m, s.shape), -math.inf)
        for s, m in zip(scores, masks, strict=True)
    ]


def topk_mask(
    scores: Sequence[Tensor],
    k: Sequence[int],
    exponents: Sequence[int],
    absolute: bool,
    masks: Sequence[Tensor],
    memory: Tensor | None,
) -> list[Tensor]:
    ranked = _candidates([s.detach().abs() if absolute else s.detach() for s in scores], masks)
    refuse_nan("topk_mask", _first_nan(ranked))
    shifts = exponents or [0] * len(scores)
    bits = _keep([_order(s, e) for s, e in zip(ranked, shifts, strict=True)], k)
    return bits if memory is None else [*bits, memory.clone()]


def topk_mask_product(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: Sequence[int],
) -> list[Tensor]:
    scores = [
        (w.detach().float() * g.detach().float()).abs()
        for w, g in zip(weights, gradients, strict=True)
    ]
    ranked = _candidates(scores, masks)
    refuse_nan("topk_mask_product", _first_nan(ranked))
    return _keep([_order(s) for s in ranked], k)


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    exponents: Sequence[int],
    k: Sequence[int],
    power: int,
    convs: Sequence[int],
) -> list[Tensor]:
    scores, shapes = [], iter(convs)
    for w, x, y in zip(weights, a, g, strict=True):
        if x.dim() == 1:
            scores.append(factored_score(w, x, y, power))
        elif w.dim() == 2:
            scores.append(path_score(w, x.float(), y.float(), power, None, 0.0))
        else:
            axes = w.dim() - 2
            stride, padding, dilation = (list(itertools.islice(shapes, axes)) for _ in range(3))
            geometry = (stride, padding, dilation, next(shapes))
            scores.append(path_conv_score(w, x.float(), y.float(), *geometry, power, None, 0.0))
    ranked = _candidates(scores, masks)
    refuse_nan("topk_mask_factored", _first_nan(ranked))
    return _keep([_order(s, e) for s, e in zip(ranked, exponents, strict=True)], k)


def factored_score(weight: Tensor, a: Tensor, g: Tensor, power: int) -> Tensor:
    """`((|w|**p) * a[i]) * g[o]` in float32, in this order of products."""
    w = weight.detach().float().abs()
    return ((w if power == 1 else w * w) * a.float()) * g.float()[:, None]


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    refuse_nan("kth_largest", _first_nan(scores))
    flat = torch.cat([s.detach().reshape(-1).double() for s in scores])
    return torch.sort(flat, descending=True).values[k - 1] + 0.0  # -0 becomes +0
