"""How a weight step calls the kernels: forward, adjoint and score, whole or by rows.

The shapes are known to fit from tracing, so the calls go to the backend's function directly: the
checks and the dispatch of the public operations would cost a ResNet-20 a third of a DPaI step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.pathgraph.steps import State, Weight


def tensor(step: Weight, state: State, like: Tensor) -> Tensor:
    """The stored weight, or the rows of it that this step uses.

    In place of a weight on the meta device stands memory of its shape that nobody writes or reads:
    power 0 needs no more, and untouched pages cost nothing.
    """
    w = state[step.parameter]
    if w.is_meta:
        w = torch.empty_like(w, device=like.device)
    if step.rows is not None:
        w = w[step.rows[0] : step.rows[1]]
    if step.kind == "linear" and w.dim() > 2:
        w = w.flatten(1)  # a view; a convolution of constant maps is a product with vectors
    return w.double() if like.dtype == torch.float64 else w


def mask(
    step: Weight, masks: Mapping[str, Tensor], shape: torch.Size, like: Tensor
) -> Tensor | None:
    """The packed mask of the stored weight, or of the rows that this step uses.

    `shape` is that of the rows in use. Rows that begin inside a byte are repacked. Masks from a
    file lie on the CPU, whatever the device of `like`, where they are needed.
    """
    packed = masks.get(step.parameter)
    if packed is not None and not (packed.is_cpu and like.is_cpu):
        packed = packed.to(like.device)
    if packed is None or step.rows is None:
        return packed
    row = shape.numel() // shape[0] if shape[0] else 0
    start, stop = step.rows[0] * row, step.rows[1] * row
    if start % 8 == 0:
        part = packed[start // 8 : (stop + 7) // 8]
        if stop % 8 == 0:
            return part
    bits = ops.unpack_mask(packed, (packed.numel() * 8,))
    return ops.pack_mask(bits[start:stop])


def kernel(operation: str, w: Tensor, x: Tensor) -> Callable[..., Any]:
    """The function of `operation` for this weight and map."""
    wide = x.dtype == torch.float64 or w.dtype == torch.float64
    return registry.resolve(operation, x.device.type, wide)


def forward(
    step: Weight, x: Tensor, state: State, masks: Mapping[str, Tensor], power: int
) -> Tensor:
    """`(|W|**power * M) x`, in the shapes of the activations."""
    return _apply(step, x, state, masks, power, step.transposed, step.out_shape)


def adjoint(
    step: Weight, g: Tensor, state: State, masks: Mapping[str, Tensor], power: int
) -> Tensor:
    """`(|W|**power * M)^T g`."""
    return _apply(step, g, state, masks, power, not step.transposed, step.in_shape)


def _apply(
    step: Weight,
    x: Tensor,
    state: State,
    masks: Mapping[str, Tensor],
    power: int,
    backward: bool,
    shape: tuple[int, ...],
) -> Tensor:
    w = tensor(step, state, x)
    m = mask(step, masks, w.shape, x)
    if step.kind == "linear":
        run = kernel("path_backward" if backward else "path_forward", w, x)
        return run(w, x.reshape(-1, x.shape[-1]), power, m).reshape(shape)
    x = x.contiguous()
    geometry = (step.stride, step.padding, step.dilation, step.groups)
    if backward:
        return kernel("path_conv_backward", w, x)(w, x, shape, *geometry, power, m)
    return kernel("path_conv_forward", w, x)(w, x, *geometry, power, m)


def score(
    step: Weight,
    x: Tensor,
    g: Tensor,
    state: State,
    masks: Mapping[str, Tensor],
    power: int,
    pruned: float = 0.0,
) -> Tensor:
    """`|W|**power * M * (g^T x)`, float32, shape of the rows in use; `pruned` where M is 0."""
    w = tensor(step, state, x)
    m = mask(step, masks, w.shape, x)
    if step.transposed:
        x, g = g, x  # the stored rows are the inputs
    if step.kind == "linear":
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return kernel("path_score", w, x)(w, x, g, power, m, pruned)
    geometry = (step.stride, step.padding, step.dilation, step.groups)
    run = kernel("path_conv_score", w, x)
    return run(w, x.contiguous(), g.contiguous(), *geometry, power, m, pruned)
