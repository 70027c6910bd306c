"""How a weight step calls the kernels: forward, adjoint and score, whole or by rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paikern import ops
from paikern.pathgraph.steps import State, Weight


def tensor(step: Weight, state: State, like: Tensor) -> Tensor:
    """The stored weight, or the rows of it that this step uses."""
    w = state[step.parameter].detach()
    if step.rows is not None:
        w = w[step.rows[0] : step.rows[1]]
    return w.double() if like.dtype == torch.float64 else w


def mask(step: Weight, masks: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """The packed mask of the stored weight, or of the rows that this step uses.

    `shape` is that of the rows in use. Rows that begin inside a byte are repacked.
    """
    packed = masks.get(step.parameter)
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


def forward(
    step: Weight, x: Tensor, state: State, masks: Mapping[str, Tensor], power: int
) -> Tensor:
    """`(|W|**power * M) x`, in the shapes of the activations."""
    w = tensor(step, state, x)
    m = mask(step, masks, w.shape)
    if step.kind == "linear":
        run = ops.path_backward if step.transposed else ops.path_forward
        y = run(w, x.reshape(-1, x.shape[-1]), power=power, mask=m)
        return y.reshape(step.out_shape)
    if step.transposed:
        return ops.path_conv_backward(
            w, x, list(step.out_shape), list(step.stride), list(step.padding),
            list(step.dilation), step.groups, power=power, mask=m,
        )  # fmt: skip
    return ops.path_conv_forward(
        w, x, list(step.stride), list(step.padding), list(step.dilation), step.groups,
        power=power, mask=m,
    )  # fmt: skip


def adjoint(
    step: Weight, g: Tensor, state: State, masks: Mapping[str, Tensor], power: int
) -> Tensor:
    """`(|W|**power * M)^T g`."""
    w = tensor(step, state, g)
    m = mask(step, masks, w.shape)
    if step.kind == "linear":
        run = ops.path_forward if step.transposed else ops.path_backward
        gx = run(w, g.reshape(-1, g.shape[-1]), power=power, mask=m)
        return gx.reshape(step.in_shape)
    if step.transposed:
        return ops.path_conv_forward(
            w, g.contiguous(), list(step.stride), list(step.padding), list(step.dilation),
            step.groups, power=power, mask=m,
        )  # fmt: skip
    return ops.path_conv_backward(
        w, g.contiguous(), list(step.in_shape), list(step.stride), list(step.padding),
        list(step.dilation), step.groups, power=power, mask=m,
    )  # fmt: skip


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
    m = mask(step, masks, w.shape)
    if step.transposed:
        x, g = g, x  # the stored rows are the inputs
    if step.kind == "linear":
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        return ops.path_score(w, x, g, power=power, mask=m, pruned=pruned)
    return ops.path_conv_score(
        w, x.contiguous(), g.contiguous(), list(step.stride), list(step.padding),
        list(step.dilation), step.groups, power=power, mask=m, pruned=pruned,
    )  # fmt: skip
