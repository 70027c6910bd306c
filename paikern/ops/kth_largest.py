"""kth_largest: the k-th largest score over one or many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.topk_mask import as_integer, check_names, check_scores, named_nan

define("kth_largest(Tensor[] scores, int k) -> Tensor")


@fake("kth_largest")
def _shape(scores: Sequence[Tensor], k: int) -> Tensor:
    return scores[0].new_empty((), dtype=torch.float64)


def kth_largest(
    scores: Tensor | Sequence[Tensor], k: int, *, names: Sequence[str] | None = None
) -> float:
    """`torch.sort(torch.cat(scores), descending=True).values[k - 1]`, without the sort or the cat.

    Args:
        scores: a tensor or a list, float32, float16, bfloat16 or float64, any shapes.
        k: 1-based rank over all of them together, 1 <= k <= N.
        names: of the tensors, for errors.

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
    check_names("kth_largest", names, len(tensors))
    rank = as_integer(k)
    if rank is None:
        raise TypeError(f"kth_largest: k must be an integer, got {k!r}")
    if total == 0:
        raise ValueError("kth_largest: there are no scores; give at least one")
    if not 1 <= rank <= total:
        raise ValueError(f"kth_largest: k must be in [1, {total}], got {rank}")
    with named_nan(names):
        return float(run("kth_largest", tensors, tensors, rank))
