"""Softmax attention, whether fused or written by hand, becomes one `Attention` step.

Between the product of queries and keys and the product with the values a hand-written attention
passes through scalings, masks and a softmax. None of these is a path; all that counts is which
keys a query may see. `AttentionValue` carries that along until the values arrive.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paikern.pathgraph import steps
from paikern.pathgraph.graph import AttentionValue, DataValue, PathValue
from paikern.pathgraph.tracer import Tracer

# An additive mask hides a key by minus infinity or by the lowest number of some dtype; fp16's is
# -65504, and no bias of a trained model comes near -1e4.
_HIDDEN = -1e4

_PASS = frozenset(
    "aten." + name
    for name in (
        "div mul div_ mul_ true_divide clone contiguous detach to _to_copy alias dropout dropout_ "
        "native_dropout tanh clamp float type_as clamp_min clamp_max"
    ).split()
)
_SHAPES = frozenset(
    "aten." + name for name in "view reshape expand unsqueeze squeeze flatten unflatten".split()
)


def visibility(mask: Any) -> Tensor | None:
    """Which keys a query may see, from a boolean or an additive mask; None for all of them.

    A mask made from parameters (a relative position bias) hides nothing.
    """
    tensor = mask.tensor if isinstance(mask, DataValue) else mask
    if not isinstance(tensor, Tensor):
        return None
    seen = tensor if tensor.dtype == torch.bool else tensor > _HIDDEN
    return None if bool(seen.all()) else seen


def masked(scores: AttentionValue, mask: Any) -> AttentionValue:
    """Scores plus an additive mask."""
    return _hide(scores, visibility(mask))


def _hide(scores: AttentionValue, visible: Tensor | None) -> AttentionValue:
    if visible is None:
        return scores
    both = visible if scores.visible is None else scores.visible & visible
    return replace(scores, visible=both.expand(scores.shape))


def apply(tracer: Tracer, name: str, args: Any, kwargs: Any) -> Any:
    """An operation on attention scores or attention weights."""
    if name == "aten.where":
        return where(tracer, *args)
    scores = args[0]
    if not isinstance(scores, AttentionValue):
        scores = args[1] if len(args) > 1 else None
    if not isinstance(scores, AttentionValue):
        raise tracer.error("attention scores may not be used here")
    if name in _PASS:
        return scores
    if name in {"aten.add", "aten.add_", "aten.sub"}:
        return masked(scores, args[1] if scores is args[0] else args[0])
    if name in {"aten.masked_fill", "aten.masked_fill_"}:
        hidden = visibility_of(tracer, args[1])
        return scores if scores.normalised else _hide(scores, ~hidden)
    if name in {"aten.softmax", "aten._softmax"}:
        return replace(scores, normalised=True)
    if name in _SHAPES:
        visible = scores.visible
        if visible is not None:
            visible = visible.expand(scores.shape).reshape(tracer.out_shape)
        return replace(scores, shape=tracer.out_shape, visible=visible)
    if name in {"aten.matmul", "aten.bmm"} and scores is args[0] and isinstance(args[1], PathValue):
        return _with_values(tracer, scores, args[1])
    if name in {"aten.mean", "aten.sum"}:
        return None  # averaged attention weights, returned for display
    raise tracer.error("this operation on attention scores has no path rule")


def where(tracer: Tracer, condition: Any, u: Any, v: Any) -> AttentionValue:
    """`where(condition, scores, -inf)` and its mirror image."""
    seen = visibility_of(tracer, condition)
    return _hide(u, seen) if isinstance(u, AttentionValue) else _hide(v, ~seen)


def visibility_of(tracer: Tracer, mask: Any) -> Tensor:
    tensor = mask.tensor if isinstance(mask, DataValue) else mask
    if not isinstance(tensor, Tensor):
        raise tracer.error("the attention mask depends on the activations")
    return tensor.bool()


def _with_values(tracer: Tracer, scores: AttentionValue, v: PathValue) -> PathValue:
    lead = v.shape[:-2]
    q = _with_lead(tracer, scores.query, lead)
    k = _with_lead(tracer, scores.key, lead)
    return attend(tracer, q, k, v, scores.visible)


def _with_lead(tracer: Tracer, x: PathValue, lead: tuple[int, ...]) -> PathValue:
    """Scores may be viewed between [B, H, T, T] and [B*H, T, T]; follow with q and k."""
    shape = (*lead, *x.shape[-2:])
    if torch.Size(shape).numel() == torch.Size(x.shape).numel():
        return tracer.reshape(x, shape)
    return x


def attend(
    tracer: Tracer, q: PathValue, k: PathValue, v: PathValue, visible: Tensor | None
) -> PathValue:
    """Emit the attention step of `steps.Attention`."""
    return tracer.emit(
        steps.Attention, [q, k, v], tracer.out_shape, visible, tracer.out_shape,
        (q.shape, k.shape, v.shape),
    )  # fmt: skip
