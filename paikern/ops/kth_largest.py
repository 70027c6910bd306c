"""kth_largest: the k-th largest score over one or many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.topk_mask import check_scores, named_nan

define("kth_largest(Tensor[] scores, int k) -> Tensor")


@fake("kth_largest")
def _shape(scores: Sequence[Tensor], k: int) -> Tensor:
    return scores[0].new_empty((), dtype=torch.float64)


def kth_largest(scores: Tensor | Sequence[Tensor], k: int) -> float:
    """`torch.sort(torch.cat(scores), descending=True).values[k - 1]`, without the sort or the cat.

    Args:
        scores: a tensor or a list, float32, float16, bfloat16 or float64, any shapes.
        k: 1-based rank over all of them together, 1 <= k <= N.

    Returns:
        The value as a Python float. -0 counts as +0; infinities count by value.

    Raises:
        NonFiniteScoreError: a tensor holds NaN.

    Example:
        >>> import torch
        >>> kth_largest(torch.tensor([3.0, 1.0, 2.0]), 2)
        2.0
    """
    tensors = check_scores("kth_largest", scores)
    total = sum(t.numel() for t in tensors)
    if not 1 <= k <= total:
        raise ValueError(f"kth_largest: k must be in [1, {total}], got {k}")
    with named_nan(None):
        return float(run("kth_largest", tensors, tensors, k))
