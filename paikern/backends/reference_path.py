"""The path operations in plain PyTorch: any float dtype, float64 included.

`V = |W|**power * M` is made in full here; the native kernels never do. Everything else is torch's
own convolution, its adjoint and its weight gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_grad

from paikern.backends.errors import refuse_nan


def _exactly(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """On a GPU without tf32, which is on by default there, and without sums in no order."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        settings = {"benchmark": False, "deterministic": True, "allow_tf32": False}
        with torch.backends.cudnn.flags(enabled=True, **settings):
            return convolution(*args, **kwargs)

    return call


_CONV = {n: _exactly(f) for n, f in ((3, F.conv1d), (4, F.conv2d), (5, F.conv3d))}
_CONV_INPUT = {
    3: _exactly(conv_grad.conv1d_input),
    4: _exactly(conv_grad.conv2d_input),
    5: _exactly(conv_grad.conv3d_input),
}
_CONV_WEIGHT = {
    3: _exactly(conv_grad.conv1d_weight),
    4: _exactly(conv_grad.conv2d_weight),
    5: _exactly(conv_grad.conv3d_weight),
}
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in the published program


def _kept(mask: Tensor, shape: torch.Size) -> Tensor:
    # Imported late: `reference` re-exports the functions of this file.
    from paikern.backends.reference import unpack_mask

    return unpack_mask(mask, shape)


def _values(weight: Tensor, power: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`|W|**power * M`; a masked NaN is 0, and power 0 reads no weight."""
    if power == 0:
        values = torch.ones(weight.shape, dtype=dtype, device=weight.device)
    else:
        values = weight.detach().to(dtype).abs() ** power
    return values if mask is None else values.masked_fill(~_kept(mask, weight.shape), 0)


def _dtype(weight: Tensor, power: int, *maps: Tensor) -> torch.dtype:
    wide = [t.dtype for t in (weight, *maps)][power == 0 :]
    return torch.float64 if torch.float64 in wide else torch.float32


def path_forward(weight: Tensor, x: Tensor, power: int, mask: Tensor | None) -> Tensor:
    dtype = _dtype(weight, power, x)
    return x.detach().to(dtype) @ _values(weight, power, mask, dtype).T


def path_backward(weight: Tensor, g: Tensor, power: int, mask: Tensor | None) -> Tensor:
    dtype = _dtype(weight, power, g)
    return g.detach().to(dtype) @ _values(weight, power, mask, dtype)


def path_score(
    weight: Tensor, x: Tensor, g: Tensor, power: int, mask: Tensor | None, pruned: float
) -> Tensor:
    dtype = _dtype(weight, power, x, g)
    columns = torch.atleast_2d(x.detach().to(dtype))
    rows = torch.atleast_2d(g.detach().to(dtype))
    return scored(weight, rows.T @ columns, power, mask, pruned)


def scored(weight: Tensor, q: Tensor, power: int, mask: Tensor | None, pruned: float) -> Tensor:
    score = _values(weight, power, mask, q.dtype) * q
    return score if mask is None else score.masked_fill(~_kept(mask, weight.shape), pruned)


def path_sweep(
    weight: Tensor, a: Tensor, g: Tensor, threshold: float, power: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from paikern.backends.reference import pack_mask

    values = _values(weight, power, None, torch.float32)
    score = (values * a.detach().float()) * g.detach().float()[:, None]
    if mask is not None:
        score = score.masked_fill(~_kept(mask, weight.shape), -torch.inf)
    refuse_nan("path_sweep", 0 if bool(torch.isnan(score).any()) else -1)
    above = score.double() > threshold
    return path_backward(weight, g, power, mask), pack_mask(above), above.sum()


def path_conv_forward(
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    dtype = _dtype(weight, power, x)
    values = _values(weight, power, mask, dtype)
    return _CONV[weight.dim()](
        x.detach().to(dtype), values, None, tuple(stride), tuple(padding), tuple(dilation), groups
    )


def path_conv_backward(
    weight: Tensor,
    g: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    dtype = _dtype(weight, power, g)
    values = _values(weight, power, mask, dtype)
    return _CONV_INPUT[weight.dim()](
        tuple(input_size),
        values,
        g.detach().to(dtype),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )


def path_conv_score(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
    pruned: float,
) -> Tensor:
    dtype = _dtype(weight, power, x, g)
    q = _weight_gradient(weight.shape, x, g, stride, padding, dilation, groups, dtype)
    return scored(weight, q, power, mask, pruned)


def _weight_gradient(
    shape: torch.Size,
    x: Tensor,
    g: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    if len(shape) == 2:
        return torch.atleast_2d(g.detach().to(dtype)).T @ torch.atleast_2d(x.detach().to(dtype))
    return _CONV_WEIGHT[len(shape)](
        x.detach().to(dtype),
        tuple(shape),
        g.detach().to(dtype),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )


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
    q = _weight_gradient(s.shape, x, g, stride, padding, dilation, groups, s.dtype)
    return dpai_update_(
        s, q * q_scale, mask, node_live, exp_avg, exp_avg_sq, alpha, beta, lr, t, groups, transposed
    )


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
    rows, columns = s.shape[:2]
    kept = _kept(mask, s.shape).reshape(rows, columns, math.prod(s.shape[2:]))
    q = q.to(s.dtype).reshape(kept.shape)
    effective = kept & (q != 0)
    kernel = effective.any(2, keepdim=True)  # [rows, columns, 1]
    live = node_live.bool()
    if transposed:  # [groups, columns] liveness, the same for every row of a group
        node = live.reshape(groups, 1, columns).expand(groups, rows // groups, columns)
        node = node.reshape(rows, columns, 1)
    else:
        node = live.reshape(rows, 1, 1)
    u = torch.where(kernel, 1 - alpha, (1 - alpha) + alpha * beta).to(s.dtype)
    u = torch.where(node, u, torch.ones_like(u))
    ascent = (u * (torch.sign(s).reshape(kept.shape) * q)).reshape(s.shape)
    if exp_avg is None or exp_avg_sq is None:
        s.add_(ascent, alpha=lr)
    else:
        exp_avg.mul_(_BETA1).add_(ascent, alpha=-(1 - _BETA1))
        exp_avg_sq.mul_(_BETA2).addcmul_(ascent, ascent, value=1 - _BETA2)
        root = (exp_avg_sq.sqrt() / (1 - _BETA2**t) ** 0.5).add_(_EPSILON)
        s.addcdiv_(exp_avg, root, value=-lr / (1 - _BETA1**t))
    return torch.stack([effective.sum(), kernel.sum(), torch.isfinite(s).all().long()]).cpu()
