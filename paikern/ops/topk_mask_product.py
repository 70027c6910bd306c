"""topk_mask_product: the exact mask of the k largest |weight * gradient|, which never exist."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.topk_mask import (
    check_counts,
    check_masks,
    check_names,
    check_scores,
    named_nan,
)

define(
    "topk_mask_product(Tensor[] weights, Tensor[] gradients, Tensor[] masks, int[] k) -> Tensor[]"
)


@fake("topk_mask_product")
def _shape(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: Sequence[int],
) -> list[Tensor]:
    return [w.new_empty((w.numel() + 7) // 8, dtype=torch.uint8) for w in weights]


def topk_mask_product(
    weights: Tensor | Sequence[Tensor],
    gradients: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    *,
    masks: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """`topk_mask` of `|weight * gradient|`, no score tensor made.

    The product is taken in float32, whatever the dtypes.

    Args:
        weights, gradients: tensors of the same shapes, float32, float16, bfloat16 or float64, any
            strides.
        k, masks, names: as in `topk_mask`.

    Returns:
        One packed mask for each weight. Ties go to the lower index.

    Raises:
        ValueError: shapes, lists or k that do not fit.
        NonFiniteScoreError: a candidate's product is NaN, named.

    Source: connection sensitivity of SNIP, Lee et al. 2019 (arXiv:1810.02340), equation 6, whose
    normalisation does not change the order.

    Example:
        >>> import torch
        >>> topk_mask_product(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 4.0, 2.0]), 1)
        [tensor([2], dtype=torch.uint8)]
    """
    name = "topk_mask_product"
    held = check_scores(name, weights)
    slopes = check_scores(name, gradients)
    if [w.shape for w in held] != [g.shape for g in slopes]:
        raise ValueError(
            f"{name}: gradients must have the shapes of the weights "
            f"{[tuple(w.shape) for w in held]}, got {[tuple(g.shape) for g in slopes]}"
        )
    counts = check_counts(name, k, [w.numel() for w in held])
    candidates = check_masks(name, masks, held)
    check_names(name, names, len(held))
    if not held:
        return []
    with named_nan(names):
        return run(name, [*held, *slopes, *candidates], held, slopes, candidates, counts)
