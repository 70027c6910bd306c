"""topk_mask_factored: the exact mask of the k largest rank-one scores, which never exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.topk_mask import (
    check_counts,
    check_exponents,
    check_masks,
    check_names,
    check_scores,
    named_nan,
)

define(
    "topk_mask_factored(Tensor[] weights, Tensor[] a, Tensor[] g, Tensor[] masks, "
    "int[] exponents, int[] k, int power) -> Tensor[]"
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
) -> list[Tensor]:
    return [w.new_empty((w.numel() + 7) // 8, dtype=torch.uint8) for w in weights]


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    exponents: Sequence[int],
    k: int | Sequence[int],
    *,
    power: int = 1,
    masks: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """`topk_mask` of `|w[o, i]|**power * a[i] * g[o] * 2**exponent`, no score tensor made.

    The score is computed in float32 as `((|w|**power) * a[i]) * g[o]`, in this order everywhere,
    and its exponent is folded into the order exactly.

    Args:
        weights: `[out, in]` each, float32, float16 or bfloat16.
        a: `[in]` each, g: `[out]` each; used in float32.
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

    Source: SynFlow, Tanaka et al. 2020 (arXiv:2006.05467), equation 2, for linear layers.

    Example:
        >>> import torch
        >>> w, a, g = torch.tensor([[1.0, -3.0]]), torch.tensor([2.0, 1.0]), torch.tensor([1.0])
        >>> topk_mask_factored([w], [a], [g], [0], 1)
        [tensor([2], dtype=torch.uint8)]
    """
    held = check_scores("topk_mask_factored", weights)
    if power not in (1, 2):
        raise ValueError(f"topk_mask_factored: power must be 1 or 2, got {power}")
    if not len(held) == len(a) == len(g) == len(exponents):
        raise ValueError(
            f"topk_mask_factored: {len(held)} weights, {len(a)} a, {len(g)} g and "
            f"{len(exponents)} exponents; give one of each a layer"
        )
    for index, (w, x, y) in enumerate(zip(held, a, g, strict=True)):
        if w.dim() != 2 or tuple(x.shape) != w.shape[1:] or tuple(y.shape) != w.shape[:1]:
            raise ValueError(
                f"topk_mask_factored: layer {index} needs weight [out, in], a [in], g [out], got "
                f"{tuple(w.shape)}, {tuple(x.shape)}, {tuple(y.shape)}"
            )
    candidates = check_masks("topk_mask_factored", masks, held)
    counts = check_counts("topk_mask_factored", k, [w.numel() for w in held])
    shifts = check_exponents("topk_mask_factored", exponents, len(held))
    check_names("topk_mask_factored", names, len(held))
    if not held:
        return []
    with named_nan(names):
        return run(
            "topk_mask_factored",
            [*held, *a, *g],
            held,
            list(a),
            list(g),
            candidates,
            shifts,
            counts,
            power,
        )
