"""topk_mask_factored: the exact mask of the k largest path scores, which never exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, of_gpu_array, run
from paikern.ops._path import conv_shape
from paikern.ops.topk_mask import (
    as_integers,
    check_counts,
    check_exponents,
    check_masks,
    check_names,
    check_scores,
    named_nan,
)

define(
    "topk_mask_factored(Tensor[] weights, Tensor[] a, Tensor[] g, Tensor[] masks, "
    "int[] exponents, int[] k, int power, int[] convs) -> Tensor[]"
)


@fake("topk_mask_factored")
def _shape(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    exponents: Sequence[int],
    k: Sequence[int],
    power: int,
    convs: Sequence[int],
) -> list[Tensor]:
    return [w.new_empty((w.numel() + 7) // 8, dtype=torch.uint8) for w in weights]


Conv = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    exponents: Sequence[int],
    k: int | Sequence[int],
    *,
    power: int = 1,
    masks: Sequence[Tensor | None] | None = None,
    convs: Sequence[Conv | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """`topk_mask` of `|w[o, i]|**power * a[i] * g[o] * 2**exponent`, no score tensor made.

    Vectors: the score is computed in float32 as `((|w|**power) * a[i]) * g[o]`, in this order
    everywhere. Maps: it is that of `path_score` or `path_conv_score`, made 65,536 scores at a time
    and the same bits each time. The exponent is folded into the order exactly.

    Args:
        weights: `[out, in]`, or `[out, in / groups, *kernel]` for a convolution; float32, float16
            or bfloat16, and with vectors float64, which is rounded to float32.
        a: `[in]`, or `[batch, in]`, or `[batch, in, *size]` for a convolution; used in float32.
        g: `[out]`, or `[batch, out]`, or `[batch, out, *size']`.
        convs: (stride, padding, dilation, groups) of each convolution, lists of one integer an
            axis; None for the others.
        exponents: one integer each, see `topk_mask`.
        k, names: as in `topk_mask`.
        power: 1 or 2.
        masks: packed masks of the candidates, or None each: other weights rank below everything,
            tied, and NaN among them does not count.

    Returns:
        One packed mask for each weight.

    Raises:
        ValueError: shapes, lists or k that do not fit.
        NonFiniteScoreError: a candidate's score is NaN (infinity times 0), named.

    Source: SynFlow, Tanaka et al. 2020 (arXiv:2006.05467), equation 2.

    Example:
        >>> import torch
        >>> w, a, g = torch.tensor([[1.0, -3.0]]), torch.tensor([2.0, 1.0]), torch.tensor([1.0])
        >>> topk_mask_factored([w], [a], [g], [0], 1)
        [tensor([2], dtype=torch.uint8)]
    """
    held = check_scores("topk_mask_factored", weights)
    a, g = [of_gpu_array(x) for x in a], [of_gpu_array(y) for y in g]
    if power not in (1, 2):
        raise ValueError(f"topk_mask_factored: power must be 1 or 2, got {power}")
    if not len(held) == len(a) == len(g) == len(exponents):
        raise ValueError(
            f"topk_mask_factored: {len(held)} weights, {len(a)} a, {len(g)} g and "
            f"{len(exponents)} exponents; give one of each a layer"
        )
    shapes = list(convs) if convs is not None else [None] * len(held)
    if len(shapes) != len(held):
        raise ValueError(f"topk_mask_factored: {len(shapes)} convs for {len(held)} weights")
    flat: list[int] = []
    for index, (w, x, y, conv) in enumerate(zip(held, a, g, shapes, strict=True)):
        flat += _check_layer(index, w, x, y, conv)
    candidates = check_masks("topk_mask_factored", masks, held)
    counts = check_counts("topk_mask_factored", k, [w.numel() for w in held])
    shifts = check_exponents("topk_mask_factored", exponents, len(held))
    check_names("topk_mask_factored", names, len(held))
    if not held:
        return []
    with named_nan(names):
        return run(
            "topk_mask_factored",
            [*held, *a, *g, *candidates],
            held,
            list(a),
            list(g),
            candidates,
            shifts,
            counts,
            power,
            flat,
        )


def _check_layer(index: int, w: Tensor, a: Tensor, g: Tensor, conv: Conv | None) -> list[int]:
    """The integers of a convolution in one row, nothing for a linear layer."""
    name = f"topk_mask_factored: layer {index}"
    maps = a.dim() > 1 or w.dim() != 2
    if maps and w.dtype == torch.float64:
        raise TypeError(f"{name}: with maps the weight must not be float64; convert it to float32")
    if w.dim() == 2:
        batch = tuple(a.shape[:-1])
        if (
            len(batch) > 1
            or tuple(a.shape) != (*batch, w.shape[1])
            or tuple(g.shape)
            != (
                *batch,
                w.shape[0],
            )
        ):
            raise ValueError(
                f"{name} needs weight [out, in], a [in], g [out], or a [batch, in], "
                f"g [batch, out], got {tuple(w.shape)}, {tuple(a.shape)}, {tuple(g.shape)}"
            )
        flat: list[int] = []
    elif conv is None:
        raise ValueError(f"{name}: a weight of shape {tuple(w.shape)} needs its entry in convs")
    else:
        if len(conv) != 4 or any(as_integers(part) is None for part in conv[:3]):
            raise TypeError(
                f"{name}: convs must hold (stride, padding, dilation, groups), the first three "
                f"lists of integers, got {conv!r}"
            )
        stride, padding, dilation, groups = conv
        out = conv_shape(name, tuple(w.shape), tuple(a.shape), stride, padding, dilation, groups)
        if tuple(g.shape) != out:
            raise ValueError(f"{name}: g must have shape {out}, got {tuple(g.shape)}")
        flat = [*stride, *padding, *dilation, groups]
    if maps and a.shape[0] == 0:
        raise ValueError(f"{name}: the maps have no position")
    return flat
