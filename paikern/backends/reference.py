"""The reference backend: every operation in plain PyTorch, obviously right, any float dtype.

It is the last fallback on every device and the truth that the kernels are tested against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.errors import refuse_nan
from paikern.backends.reference_maps import (
    live_nodes,
    map_maximum,
    map_scale_,
    through_maximum_,
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
)

__all__ = [
    "apply_mask_",
    "dpai_step_",
    "dpai_update_",
    "kth_largest",
    "live_nodes",
    "map_maximum",
    "map_scale_",
    "pack_mask",
    "path_backward",
    "path_conv_backward",
    "path_conv_forward",
    "path_conv_score",
    "path_forward",
    "path_score",
    "through_maximum_",
    "topk_mask",
    "topk_mask_factored",
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


def _order(tensor: Tensor, exponent: int, absolute: bool) -> Tensor:
    """Keys that sort like value * 2**exponent; -0 is +0. float64 holds any fp32 exponent."""
    values = tensor.detach().reshape(-1).double()
    if absolute:
        values = values.abs()
    return torch.where(values > 0, torch.ldexp(values, torch.tensor(exponent)), values) + 0.0


def _ranked(keys: Tensor) -> Tensor:
    """Indices by key descending, lower index first on ties."""
    return torch.sort(keys, descending=True, stable=True).indices


def _keep(keys: list[Tensor], k: Sequence[int]) -> list[Tensor]:
    if len(k) == 1 and len(keys) != 1:
        flat = torch.cat(keys) if keys else torch.empty(0)
        chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
        chosen[_ranked(flat)[: k[0]]] = True
        return [pack_mask(part) for part in chosen.split([key.numel() for key in keys])]
    masks = []
    for key, count in zip(keys, k, strict=True):
        chosen = torch.zeros(key.numel(), dtype=torch.bool, device=key.device)
        chosen[_ranked(key)[:count]] = True
        masks.append(pack_mask(chosen))
    return masks


def _first_nan(tensors: Sequence[Tensor]) -> int:
    return next((i for i, t in enumerate(tensors) if bool(torch.isnan(t).any())), -1)


def topk_mask(
    scores: Sequence[Tensor], k: Sequence[int], exponents: Sequence[int], absolute: bool
) -> list[Tensor]:
    refuse_nan("topk_mask", _first_nan(scores))
    shifts = exponents or [0] * len(scores)
    keys = [_order(s, e, absolute) for s, e in zip(scores, shifts, strict=True)]
    return _keep(keys, k)


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    exponents: Sequence[int],
    k: Sequence[int],
    power: int,
) -> list[Tensor]:
    scores = [factored_score(w, ai, gi, power) for w, ai, gi in zip(weights, a, g, strict=True)]
    refuse_nan("topk_mask_factored", _first_nan(scores))
    for score, packed in zip(scores, masks, strict=True):
        if packed.numel():
            score.masked_fill_(~unpack_mask(packed, score.shape), -1.0)
    keys = [_order(s, e, False) for s, e in zip(scores, exponents, strict=True)]
    return _keep(keys, k)


def factored_score(weight: Tensor, a: Tensor, g: Tensor, power: int) -> Tensor:
    """`((|w|**p) * a[i]) * g[o]` in float32, in this order of products."""
    w = weight.detach().float().abs()
    return ((w if power == 1 else w * w) * a.float()) * g.float()[:, None]


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    refuse_nan("kth_largest", _first_nan(scores))
    flat = torch.cat([s.detach().reshape(-1).double() for s in scores])
    return torch.sort(flat, descending=True).values[k - 1]
