"""dpai_step_: one update of a layer's DPaI scores, fused into one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paikern.ops._library import define, fake
from paikern.ops._path import check_conv_map, check_float, check_map, conv_size, run
from paikern.ops.unpack_mask import check_packed

_STATE = "Tensor(b!)? exp_avg, Tensor(c!)? exp_avg_sq"
_RULE = "float alpha, float beta, float lr, int t"
define(
    f"dpai_step_(Tensor(a!) s, Tensor mask, Tensor x, Tensor g, Tensor node_live, {_STATE}, "
    f"float q_scale, {_RULE}, int[] stride, int[] padding, int[] dilation, int groups, "
    "bool transposed) -> Tensor"
)
define(
    f"dpai_update_(Tensor(a!) s, Tensor q, Tensor mask, Tensor node_live, {_STATE}, {_RULE}, "
    "int groups, bool transposed) -> Tensor"
)


@fake("dpai_step_")
def _step_shape(s: Tensor, *args: object) -> Tensor:
    return torch.empty(3, dtype=torch.int64)


@fake("dpai_update_")
def _update_shape(s: Tensor, *args: object) -> Tensor:
    return torch.empty(3, dtype=torch.int64)


class DpaiCounts(NamedTuple):
    """What the mask was worth before the update, and whether every score after it is finite."""

    params: int
    kernels: int
    finite: bool


def dpai_step_(
    s: Tensor,
    mask: Tensor,
    x: Tensor,
    g: Tensor,
    node_live: Tensor,
    q_scale: float,
    *,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    alpha: float = 0.99,
    beta: float = 0.5,
    lr: float,
    t: int = 1,
    stride: Sequence[int] = (),
    padding: Sequence[int] = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
    transposed: bool = False,
) -> DpaiCounts:
    """One DPaI update of `s` in place; the mask gradient q never exists as a tensor.

        q = q_scale * (g^T x)              the weight gradient of the two maps, shape of s
        f = any kept weight of the kernel (o, i) with q != 0
        u = 1 where the node is not live, 1 - alpha where f, else (1 - alpha) + alpha * beta
        a = u * sign(s) * q                sign(0) = 0
        s += lr * a                        or, with moments, an Adam step on the gradient -a

    Args:
        s: `[out, in]` or `[out, in / groups, *kernel]` float32, contiguous, written.
        mask: packed bits of the mask that the maps were made with.
        x: the map of the columns of s, `[in]`, `[batch, in]` or `[batch, in, *size]`.
        g: the map of the rows of s, `[out]`, `[batch, out]` or `[batch, out, *size']`.
            For weights whose dimension 0 is the layer's input (HF Conv1D, transposed
            convolutions) these are the outgoing and the incoming paths, in this order.
        node_live: uint8 or bool, one for each output unit of the layer: each row of s, or each
            column channel (all groups) where `transposed`.
        q_scale: makes q the gradient of the objective with respect to the mask.
        exp_avg, exp_avg_sq: Adam's moments (betas 0.9 and 0.999, epsilon 1e-8), written; both or
            neither, and neither is plain ascent.
        alpha, beta: in [0, 1]. lr: step size. t: number of this step from 1, for Adam.
        stride, padding, dilation, groups: of a convolution.
        transposed: nodes are the columns of s.

    Returns:
        DpaiCounts: kept weights with q != 0, kernels with such a weight (both of the mask before
        the update), and whether no score is NaN or infinite now. Products that underflow to 0
        count as 0: choose the exponents of the maps so that none does.

    Raises:
        ValueError: shapes that do not fit. TypeError: other dtypes.

    Source: DPaI poster, algorithm 1, lines 8 to 12.

    Example:
        >>> import torch
        >>> s, mask = torch.tensor([[1.0, -1.0]]), torch.tensor([1], dtype=torch.uint8)
        >>> live = torch.ones(1, dtype=torch.uint8)
        >>> dpai_step_(s, mask, torch.ones(2), torch.ones(1), live, 1.0, alpha=0.5, lr=1.0)
        DpaiCounts(params=1, kernels=1, finite=True)
        >>> s
        tensor([[ 1.5000, -1.7500]])
    """
    name = "dpai_step_"
    _check_state(name, s, mask, node_live, exp_avg, exp_avg_sq, groups, transposed)
    if s.dim() == 2:
        check_map(name, "x", x, s.shape[1], s)
        check_map(name, "g", g, s.shape[0], s)
        if x.shape[:-1] != g.shape[:-1]:
            raise ValueError(
                f"{name}: x {tuple(x.shape)} and g {tuple(g.shape)} must have the same batch"
            )
        stride = padding = dilation = ()
    else:
        size = conv_size(name, s, x.shape, stride, padding, dilation, groups)
        check_float(name, "x", x)
        check_conv_map(name, "g", g, size)
    found = run(
        "dpai_step_", s, mask, x, g, node_live, exp_avg, exp_avg_sq, q_scale, alpha, beta, lr, t,
        stride, padding, dilation, groups, transposed,
    )  # fmt: skip
    return _counts(found)


def dpai_update_(
    s: Tensor,
    q: Tensor,
    mask: Tensor,
    node_live: Tensor,
    *,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    alpha: float = 0.99,
    beta: float = 0.5,
    lr: float,
    t: int = 1,
    groups: int = 1,
    transposed: bool = False,
) -> DpaiCounts:
    """`dpai_step_` with the mask gradient `q` given, for a weight that is used more than once.

    Args:
        q: shape of s, the sum over all uses, q_scale included. Everything else as `dpai_step_`.

    Example:
        >>> import torch
        >>> s, mask = torch.tensor([[1.0, -1.0]]), torch.tensor([1], dtype=torch.uint8)
        >>> dpai_update_(s, torch.ones(1, 2), mask, torch.zeros(1, dtype=torch.uint8), lr=0.5)
        DpaiCounts(params=1, kernels=1, finite=True)
        >>> s
        tensor([[ 1.5000, -1.5000]])
    """
    name = "dpai_update_"
    _check_state(name, s, mask, node_live, exp_avg, exp_avg_sq, groups, transposed)
    check_conv_map(name, "q", q, tuple(s.shape))
    found = run(
        "dpai_update_", s, q, mask, node_live, exp_avg, exp_avg_sq, alpha, beta, lr, t, groups,
        transposed,
    )  # fmt: skip
    return _counts(found)


def _counts(found: Tensor) -> DpaiCounts:
    params, kernels, finite = found.tolist()
    return DpaiCounts(params, kernels, bool(finite))


def _check_state(
    name: str,
    s: Tensor,
    mask: Tensor,
    node_live: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    groups: int,
    transposed: bool,
) -> None:
    if s.dim() not in (2, 3, 4, 5):
        raise ValueError(
            f"{name}: s must be [out, in] or [out, in / groups, *kernel], got {tuple(s.shape)}"
        )
    if (exp_avg is None) != (exp_avg_sq is None):
        raise ValueError(f"{name}: give both exp_avg and exp_avg_sq, or neither")
    for argument, value in (("s", s), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if value is None:
            continue
        if value.dtype not in (torch.float32, torch.float64) or value.dtype != s.dtype:
            raise TypeError(f"{name}: {argument} must be float32, got {value.dtype}")
        if value.shape != s.shape or not value.is_contiguous():
            raise ValueError(
                f"{name}: {argument} must be contiguous with shape {tuple(s.shape)}, "
                f"got {tuple(value.shape)}"
            )
    if groups < 1 or s.shape[0] % groups:
        raise ValueError(f"{name}: groups must divide the {s.shape[0]} rows of s, got {groups}")
    nodes = s.shape[1] * groups if transposed else s.shape[0]
    if node_live.dtype not in (torch.uint8, torch.bool) or tuple(node_live.shape) != (nodes,):
        raise ValueError(
            f"{name}: node_live must be uint8 or bool with shape ({nodes},), got "
            f"{node_live.dtype} with shape {tuple(node_live.shape)}"
        )
    check_packed(name, mask, s.numel())
