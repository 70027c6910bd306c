"""The native path operations: shapes -> one geometry object, tensors -> addresses.

float64 is the reference backend's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paikern import _C
from paikern.backends.errors import refuse_nan
from paikern.errors import BackendError

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in the published program


@functools.lru_cache(maxsize=4096)
def _linear(batch: int, rows: int, columns: int) -> _C.PathGeometry:
    return _C.PathGeometry((batch, 1, rows, columns, *(1,) * 9, *(0,) * 3, *(1,) * 6))


def _three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


@functools.lru_cache(maxsize=4096)
def _convolution(
    weight: tuple[int, ...],
    x: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[_C.PathGeometry, tuple[int, ...]]:
    """The geometry and the spatial size of the output; `x` is the size of the column map."""
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
    )
    axes = ((x[2:], 1), (weight[2:], 1), (stride, 1), (padding, 0), (dilation, 1), (out, 1))
    spatial = (value for values, fill in axes for value in _three(values, fill))
    return _C.PathGeometry((x[0], groups, weight[0], x[1], *spatial)), out


def score_geometry(weight: Tensor, x: Tensor, convs: Iterator[int]) -> _C.PathGeometry:
    """The geometry of a score from maps; a convolution takes its integers from `convs`."""
    if weight.dim() == 2:
        return _linear(x.shape[0], *weight.shape)
    axes = weight.dim() - 2
    stride, padding, dilation = (tuple(itertools.islice(convs, axes)) for _ in range(3))
    shapes = tuple(weight.shape), tuple(x.shape)
    return _convolution(*shapes, stride, padding, dilation, next(convs))[0]


def _view(weight: Tensor, power: int, mask: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """The weight as the kernels read it, its type code, and the mask; both kept alive by it."""
    kept = mask if mask is None or mask.is_contiguous() else mask.contiguous()
    if power == 0:
        return weight, 0, kept
    code = _TYPES.get(weight.dtype)
    if code is None:
        raise BackendError(
            f"the cpu backend reads float32, bfloat16 and float16 weights, got {weight.dtype}; "
            "use backend='reference'"
        )
    return weight if weight.is_contiguous() else weight.contiguous(), code, kept


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor
    if tensor.dtype == torch.float64:
        raise BackendError("the cpu backend has no float64 kernels; use backend='reference'")
    return tensor.to(torch.float32).contiguous()


def _product(
    run: Any, geometry: _C.PathGeometry, weight: Tensor, power: int, mask: Tensor | None,
    source: Tensor, target: Tensor,
) -> Tensor:  # fmt: skip
    if target.numel() == 0:
        return target
    if source.numel() == 0 or weight.numel() == 0:
        return target.zero_()
    w, code, kept = _view(weight, power, mask)
    held = _float(source)
    run(
        geometry, w.data_ptr(), code, power, _address(kept), held.data_ptr(), target.data_ptr()
    )  # fmt: skip
    return target


def _score(
    geometry: _C.PathGeometry, weight: Tensor, power: int, mask: Tensor | None,
    x: Tensor, g: Tensor, pruned: float,
) -> Tensor:  # fmt: skip
    score = torch.empty(weight.shape, dtype=torch.float32)
    if score.numel() == 0:
        return score
    if x.numel() == 0:  # no position: a sum of nothing
        from paikern.backends.reference_path import scored

        return scored(weight, score.zero_(), power, mask, pruned)
    w, code, kept = _view(weight, power, mask)
    columns, rows = _float(x), _float(g)
    _C.path_score(
        geometry, w.data_ptr(), code, power, _address(kept), columns.data_ptr(), rows.data_ptr(),
        pruned, score.data_ptr(),
    )  # fmt: skip
    return score


def _batch(x: Tensor) -> int:
    return 1 if x.dim() == 1 else x.shape[0]


def path_forward(weight: Tensor, x: Tensor, power: int, mask: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    z = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
    geometry = _linear(_batch(x), rows, columns)
    return _product(_C.path_forward, geometry, weight, power, mask, x, z)


def path_backward(weight: Tensor, g: Tensor, power: int, mask: Tensor | None) -> Tensor:
    rows, columns = weight.shape
    x = torch.empty((*g.shape[:-1], columns), dtype=torch.float32)
    geometry = _linear(_batch(g), rows, columns)
    return _product(_C.path_backward, geometry, weight, power, mask, g, x)


def path_score(
    weight: Tensor, x: Tensor, g: Tensor, power: int, mask: Tensor | None, pruned: float
) -> Tensor:
    return _score(_linear(_batch(x), *weight.shape), weight, power, mask, x, g, pruned)


def path_sweep(
    weight: Tensor, a: Tensor, g: Tensor, threshold: float, power: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = weight.shape
    x = torch.empty(columns, dtype=torch.float32)
    bits = torch.empty((weight.numel() + 7) >> 3, dtype=torch.uint8)
    if weight.numel() == 0:
        return x.zero_(), bits, torch.tensor(0)
    w, code, kept = _view(weight, power, mask)
    left, right = _float(a), _float(g)
    above = _C.path_sweep(
        rows, columns, w.data_ptr(), code, power, _address(kept), left.data_ptr(),
        right.data_ptr(), threshold, x.data_ptr(), bits.data_ptr(),
    )  # fmt: skip
    refuse_nan("path_sweep", 0 if above < 0 else -1)
    return x, bits, torch.tensor(above)


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
    geometry, out = _convolution(
        tuple(weight.shape), tuple(x.shape), tuple(stride), tuple(padding), tuple(dilation), groups
    )
    z = torch.empty((x.shape[0], weight.shape[0], *out), dtype=torch.float32)
    return _product(_C.path_forward, geometry, weight, power, mask, x, z)


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
    size = tuple(input_size)
    geometry, _ = _convolution(
        tuple(weight.shape), size, tuple(stride), tuple(padding), tuple(dilation), groups
    )
    x = torch.empty(size, dtype=torch.float32)
    return _product(_C.path_backward, geometry, weight, power, mask, g, x)


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
    geometry, _ = _convolution(
        tuple(weight.shape), tuple(x.shape), tuple(stride), tuple(padding), tuple(dilation), groups
    )
    return _score(geometry, weight, power, mask, x, g, pruned)


def _rule(
    q_scale: float, alpha: float, beta: float, lr: float, t: int, adam: bool
) -> tuple[float, ...]:
    """The constants of one update, in the order of DpaiRule (csrc/cpu/path_kernels.h)."""
    effective = 1 - alpha
    return (
        q_scale,
        effective + alpha * beta,
        effective,
        lr / (1 - _BETA1**t) if adam else lr,
        _BETA1,
        _BETA2,
        (1 - _BETA2**t) ** -0.5,
        _EPSILON,
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
    if s.numel() == 0:
        return torch.tensor([0, 0, 1])
    if x.numel() == 0:  # no position: q is 0 everywhere
        return dpai_update_(
            s, torch.zeros_like(s), mask, node_live, exp_avg, exp_avg_sq,
            alpha, beta, lr, t, groups, transposed,
        )  # fmt: skip
    if s.dim() == 2:
        geometry = _linear(_batch(x), *s.shape)
    else:
        geometry, _ = _convolution(
            tuple(s.shape), tuple(x.shape), tuple(stride), tuple(padding), tuple(dilation), groups
        )
    columns, rows, bits, live = _float(x), _float(g), mask.contiguous(), node_live.contiguous()
    rule = _rule(q_scale, alpha, beta, lr, t, exp_avg is not None)
    found = _C.dpai_step(
        geometry, s.data_ptr(), _address(exp_avg), _address(exp_avg_sq), bits.data_ptr(),
        live.data_ptr(), transposed, columns.data_ptr(), rows.data_ptr(), rule,
    )  # fmt: skip
    return torch.tensor(found)


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
    if s.numel() == 0:
        return torch.tensor([0, 0, 1])
    ones = (1,) * (s.dim() - 2)
    kernel = tuple(s.shape[2:])
    # A convolution of one position: the update needs the kernel size and the groups, no map.
    geometry, _ = _convolution(
        tuple(s.shape), (1, s.shape[1] * groups, *kernel), ones, (0,) * len(ones), ones, groups
    )
    values, bits, live = _float(q), mask.contiguous(), node_live.contiguous()
    found = _C.dpai_update(
        geometry, s.data_ptr(), _address(exp_avg), _address(exp_avg_sq), bits.data_ptr(),
        live.data_ptr(), transposed, values.data_ptr(),
        _rule(1.0, alpha, beta, lr, t, exp_avg is not None),
    )  # fmt: skip
    return torch.tensor(found)
