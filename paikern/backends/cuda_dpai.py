"""The DPaI update by CUDA (csrc/cuda/dpai.cuh).

For vectors the mask gradient is made where it is needed; for maps it is one float32 a weight, made
by the kernel of path scores and read by the update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.cuda_launch import Step, run
from paikern.backends.cuda_path import as_map, path_conv_score, path_score

__all__ = ["dpai_step_", "dpai_update_", "rule"]

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in the published program
_FLAT = 1024  # kPkFlat


def rule(
    alpha: float, beta: float, lr: float, t: int, adam: bool, q_scale: float
) -> tuple[float, ...]:
    """PaikernDpaiRule of one step; its last number, of which it makes no use, is q_scale."""
    effective = 1 - alpha
    return (
        effective + alpha * beta,
        effective,
        lr / (1 - _BETA1**t) if adam else lr,
        _BETA1,
        _BETA2,
        (1 - _BETA2**t) ** -0.5,
        _EPSILON,
        q_scale,
    )


def blocks(rows: int, columns: int, taps: int) -> int:
    """How many blocks an update has work for."""
    return -(-rows * columns // max(1, _FLAT // taps))


def dpai_step_(
    s: Tensor,
    mask: Tensor,
    x: Tensor,
    g: Tensor,
    node_live: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    q_scale: float,
    alpha: float,
    beta: float,
    lr: float,
    t: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool,
) -> Tensor:
    q, maps = None, None
    if s.dim() == 2 and x.dim() == 1:
        maps = (as_map(x), as_map(g))
    elif s.dim() == 2:
        q = path_score(s, x, g, 0, None, 0.0)
    else:
        q = path_conv_score(s, x, g, stride, padding, dilation, groups, 0, None, 0.0)
    numbers = rule(alpha, beta, lr, t, exp_avg is not None, q_scale)
    return _update(s, q, maps, mask, node_live, exp_avg, exp_avg_sq, numbers, groups, transposed)


def dpai_update_(
    s: Tensor,
    q: Tensor,
    mask: Tensor,
    node_live: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    alpha: float,
    beta: float,
    lr: float,
    t: int,
    groups: int,
    transposed: bool,
) -> Tensor:
    numbers = rule(alpha, beta, lr, t, exp_avg is not None, 1.0)
    held = as_map(q)
    return _update(s, held, None, mask, node_live, exp_avg, exp_avg_sq, numbers, groups, transposed)


def _update(
    s: Tensor,
    q: Tensor | None,
    maps: tuple[Tensor, Tensor] | None,
    mask: Tensor,
    node_live: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    numbers: tuple[float, ...],
    groups: int,
    transposed: bool,
) -> Tensor:
    if s.numel() == 0:
        return torch.tensor([0, 0, 1])
    rows, columns = s.shape[:2]
    taps = math.prod(s.shape[2:])
    packed, live = mask.contiguous(), node_live.contiguous()
    held = torch.tensor(numbers, dtype=torch.float32, device=s.device)
    found = torch.zeros(3, dtype=torch.int64, device=s.device)
    x, g = maps if maps is not None else (None, None)
    tensors = (s, exp_avg, exp_avg_sq, packed, q, x, g, live, held)
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    arguments = (
        *addresses, held.data_ptr() + 4 * 7, found.data_ptr(), rows, columns, taps, groups,
        int(transposed),
    )  # fmt: skip
    run(s, [Step("paikern_dpai_update", blocks(rows, columns, taps), arguments)])
    params, kernels, broken = found.tolist()
    return torch.tensor([params, kernels, int(broken == 0)])
