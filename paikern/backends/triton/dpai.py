"""dpai_step_ and dpai_update_: one update of a layer's DPaI scores.

    q = q_scale * (g^T x);  f = any kept weight of the kernel (o, i) with q != 0
    u = 1 where the node is not live, 1 - alpha where f, else (1 - alpha) + alpha * beta
    a = u * sign(s) * q;  ascent: s += lr * a;  Adam: a step on the gradient -a

Tiles [kernels, weights of a kernel]. For vectors q is made from them where it is needed; for maps
it is one float32 a weight, made by path_conv_score's kernel, and read here. Bytes moved a weight:
8 for ascent, 24 with Adam (s, m and v read and written), 1/8 for the mask, 8 more for the q of
maps. Limit: memory bandwidth. Counts are integers. Source: DPaI poster, algorithm 1, lines 8 to 12.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends import reference
from paikern.backends.triton.config import blocks, config, launch
from paikern.backends.triton.products import path_conv_score, path_score
from paikern.backends.triton.sweeps import as_float
from paikern.backends.triton.tiles import bit_at

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in the published program
_WIDEST = 2048  # weights of a kernel that a tile holds


@triton.jit
def dpai_kernel(
    s,
    q,
    x,
    g,
    mask,
    live,
    mean,
    square,
    found,
    rule,
    kernels,
    columns,
    weights,
    group_rows,
    VECTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ADAM: tl.constexpr,
    KERNELS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """s [rows, columns, weights], kernels = rows * columns.

    rule: q_scale, u of effective and of other kernels, step, 1 / sqrt(1 - beta2**t), beta1, beta2,
    1 - beta1, 1 - beta2, epsilon. found: [3] kept weights with q != 0, kernels, broken scores.
    """
    kernel = tl.program_id(0).to(tl.int64) * KERNELS + tl.arange(0, KERNELS)
    weight = tl.arange(0, WEIGHTS)
    known = kernel < kernels
    inside = known[:, None] & (weight < weights)[None, :]
    index = kernel[:, None] * weights + weight[None, :]
    row = kernel // columns
    column = kernel - row * columns
    if VECTORS:
        slope = tl.load(g + row, mask=known, other=0.0) * tl.load(x + column, mask=known, other=0.0)
        slope = slope[:, None] + tl.zeros([KERNELS, WEIGHTS], dtype=tl.float32)
    else:
        slope = tl.load(q + index, mask=inside, other=0.0)
    slope = slope * tl.load(rule)
    effective = inside & bit_at(mask, index, inside) & (slope != 0)
    alive = tl.max(effective.to(tl.int32), 1)
    if TRANSPOSED:
        node = row // group_rows * columns + column
    else:
        node = row
    reached = tl.load(live + node, mask=known, other=0) != 0
    u = tl.where(alive > 0, tl.load(rule + 1), tl.load(rule + 2))
    u = tl.where(reached, u, 1.0)[:, None]
    score = tl.load(s + index, mask=inside, other=0.0)
    sign = (score > 0).to(tl.float32) - (score < 0).to(tl.float32)
    ascent = u * (sign * slope)
    step = tl.load(rule + 3)
    if ADAM:
        first = tl.load(mean + index, mask=inside, other=0.0)
        second = tl.load(square + index, mask=inside, other=0.0)
        first = first * tl.load(rule + 5) - tl.load(rule + 7) * ascent
        second = second * tl.load(rule + 6) + tl.load(rule + 8) * ascent * ascent
        tl.store(mean + index, first, mask=inside)
        tl.store(square + index, second, mask=inside)
        root = tl.sqrt_rn(second) * tl.load(rule + 4) + tl.load(rule + 9)
        score = score - step * tl.div_rn(first, root)
    else:
        score = score + step * ascent
    tl.store(s + index, score, mask=inside)
    broken = inside & (score - score != 0.0)  # NaN and infinity
    tl.atomic_add(found, tl.sum(tl.sum(effective.to(tl.int64), 1), 0), sem="relaxed")
    tl.atomic_add(found + 1, tl.sum(alive.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(found + 2, tl.sum(tl.sum(broken.to(tl.int64), 1), 0), sem="relaxed")


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
    if math.prod(s.shape[2:]) > _WIDEST:
        return reference.dpai_step_(
            s, mask, x, g, node_live, exp_avg, exp_avg_sq, q_scale, alpha, beta, lr, t, stride,
            padding, dilation, groups, transposed,
        )  # fmt: skip
    rule = _rule(q_scale, alpha, beta, lr, t, exp_avg is not None)
    if s.dim() == 2 and x.dim() == 1:
        maps = (as_float(x), as_float(g))
        return _update(s, s, maps, mask, node_live, exp_avg, exp_avg_sq, rule, groups, transposed)
    if s.dim() == 2:
        q = path_score(s, x, g, 0, None, 0.0)
    else:
        q = path_conv_score(s, x, g, stride, padding, dilation, groups, 0, None, 0.0)
    return _update(s, q, None, mask, node_live, exp_avg, exp_avg_sq, rule, groups, transposed)


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
    if math.prod(s.shape[2:]) > _WIDEST:
        return reference.dpai_update_(
            s, q, mask, node_live, exp_avg, exp_avg_sq, alpha, beta, lr, t, groups, transposed
        )
    rule = _rule(1.0, alpha, beta, lr, t, exp_avg is not None)
    return _update(
        s, as_float(q), None, mask, node_live, exp_avg, exp_avg_sq, rule, groups, transposed
    )


def _rule(
    q_scale: float, alpha: float, beta: float, lr: float, t: int, adam: bool
) -> tuple[float, ...]:
    """The constants of one update, rounded to float32 once."""
    return (
        q_scale,
        1 - alpha,
        (1 - alpha) + alpha * beta,
        lr / (1 - _BETA1**t) if adam else lr,
        (1 - _BETA2**t) ** -0.5,
        _BETA1,
        _BETA2,
        1 - _BETA1,
        1 - _BETA2,
        _EPSILON,
    )


def _update(
    s: Tensor,
    q: Tensor,
    maps: tuple[Tensor, Tensor] | None,
    mask: Tensor,
    node_live: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    rule: tuple[float, ...],
    groups: int,
    transposed: bool,
) -> Tensor:
    if s.numel() == 0:
        return torch.tensor([0, 0, 1])
    rows, columns = s.shape[:2]
    weights = math.prod(s.shape[2:])
    found = torch.zeros(3, dtype=torch.int64, device=s.device)
    x, g = maps or (s, s)
    width = triton.next_power_of_2(weights)
    tile, warps = config().pattern
    high = max(1, 8 * tile // width)
    mean, square = (exp_avg, exp_avg_sq) if exp_avg is not None else (s, s)
    warps = max(warps, width // 256)
    launch(
        dpai_kernel, (blocks(rows * columns, high),), s, s, q, x, g, mask.contiguous(),
        node_live.contiguous().view(torch.uint8), mean, square, found,
        torch.tensor(rule, dtype=torch.float32, device=s.device), rows * columns, columns, weights,
        rows // groups, VECTORS=maps is not None, TRANSPOSED=transposed, ADAM=exp_avg is not None,
        KERNELS=high, WEIGHTS=width, warps=warps,
    )  # fmt: skip
    params, kernels, broken = found.tolist()
    return torch.tensor([params, kernels, int(broken == 0)])
