"""Weights: linear, matrix products, convolutions, attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern.pathgraph.graph import AttentionValue, DataValue, ParamValue, PathValue
from paikern.pathgraph.rules.table import argument, per_dimension, rule
from paikern.pathgraph.tracer import Tracer


@rule("linear")
def _linear(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return _by_matrix(tracer, args[0], args[1], argument(args, kwargs, 2, "bias"), stored_out=True)


@rule("addmm")
def _addmm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return _by_matrix(tracer, args[1], args[2], args[0], stored_out=False)


def _by_matrix(tracer: Tracer, x: Any, w: Any, bias: Any, *, stored_out: bool) -> PathValue:
    """`x @ W` for a parameter, stored `[out, in]` or `[in, out]`."""
    if not isinstance(x, PathValue):
        raise tracer.error("the activation takes the place of the weight")
    stored_in_out = isinstance(w, ParamValue) and w.transposed == stored_out
    return tracer.weight(x, w, kind="linear", transposed=stored_in_out, bias=tracer.reader(bias))


@rule("matmul", "mm", "bmm")
def _matmul(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    u, v = args[0], args[1]
    if isinstance(u, PathValue) and isinstance(v, PathValue):
        return AttentionValue(
            tracer.without_scalar(u), tracer.permute_last(tracer.without_scalar(v)),
            tracer.out_shape,
        )  # fmt: skip
    if isinstance(u, PathValue) and isinstance(v, ParamValue) and v.parameter and len(v.shape) == 2:
        return _by_matrix(tracer, u, v, None, stored_out=False)
    if isinstance(u, PathValue) and isinstance(v, (Tensor, DataValue)):
        right = (v.tensor if isinstance(v, DataValue) else v).abs().float()
        return tracer.replay(u, lambda x: torch.matmul(x, right.to(x)))
    if isinstance(v, PathValue) and isinstance(u, (Tensor, DataValue)):
        left = (u.tensor if isinstance(u, DataValue) else u).abs().float()
        return tracer.replay(v, lambda x: torch.matmul(left.to(x), x))
    raise tracer.error("a product with a batch of parameters is not supported")


@rule("baddbmm")
def _baddbmm(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    from paikern.pathgraph.rules import attention

    scores = _matmul(tracer, args[1:3], {})
    if isinstance(scores, AttentionValue) and not isinstance(args[0], PathValue):
        return attention.masked(scores, args[0])
    return scores


_CONV_SPATIAL = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@rule("conv1d", "conv2d", "conv3d")
def _conv(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    n = _CONV_SPATIAL[tracer.op.removeprefix("aten.")]
    x, w, bias = args[0], args[1], argument(args, kwargs, 2, "bias")
    stride = per_dimension(argument(args, kwargs, 3, "stride", 1), n)
    padding = argument(args, kwargs, 4, "padding", 0)
    dilation = per_dimension(argument(args, kwargs, 5, "dilation", 1), n)
    groups = argument(args, kwargs, 6, "groups", 1)
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            pads = [p for r in reversed(reach) for p in (r // 2, r - r // 2)]
            shape = (*x.shape[:-n], *(s + r for s, r in zip(x.shape[-n:], reach, strict=True)))
            x = tracer.pad(x, pads, shape)
            padding = 0
        else:
            padding = [r // 2 for r in reach] if padding == "same" else 0
    return tracer.weight(
        x, w, kind="conv", transposed=False, stride=stride, padding=per_dimension(padding, n),
        dilation=dilation, groups=groups, bias=tracer.reader(bias), kernel=tuple(w.shape[2:]),
    )  # fmt: skip


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    n = int(tracer.op[-2])
    stride = per_dimension(argument(args, kwargs, 3, "stride", 1), n)
    more = per_dimension(argument(args, kwargs, 5, "output_padding", 0), n)
    if any(m >= s for m, s in zip(more, stride, strict=True)):
        # The convolution of which this is the adjoint would have more outputs than this has inputs.
        raise tracer.error(
            f"a transposed convolution with output_padding={more} and stride={stride} is not "
            "supported; use output_padding below the stride and pad the result"
        )
    return tracer.weight(
        args[0], args[1], kind="conv", transposed=True, kernel=tuple(args[1].shape[2:]),
        stride=stride,
        padding=per_dimension(argument(args, kwargs, 4, "padding", 0), n),
        dilation=per_dimension(argument(args, kwargs, 7, "dilation", 1), n),
        groups=argument(args, kwargs, 6, "groups", 1),
        bias=tracer.reader(argument(args, kwargs, 2, "bias")),
    )  # fmt: skip


@rule("scaled_dot_product_attention")
def _sdpa(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    from paikern.pathgraph.rules import attention

    mask = argument(args, kwargs, 3, "attn_mask")
    causal = argument(args, kwargs, 5, "is_causal", False)
    q, k, v = args[:3]
    if not all(isinstance(t, PathValue) for t in (q, k, v)):
        raise tracer.error("queries, keys and values must all depend on the input")
    visible = attention.visibility(mask)
    if causal:
        lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        visible = lower if visible is None else visible & lower
    return attention.attend(tracer, q, k, v, visible)
