"""nm_mask: of every m consecutive scores the n largest, as bits."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.topk_mask import check_names, check_scores, named_nan

define("nm_mask(Tensor[] scores, int n, int m, int[] dims, bool absolute) -> Tensor[]")


@fake("nm_mask")
def _shape(
    scores: Sequence[Tensor], n: int, m: int, dims: Sequence[int], absolute: bool
) -> list[Tensor]:
    return [s.new_empty((s.numel() + 7) // 8, dtype=torch.uint8) for s in scores]


def nm_mask(
    scores: Tensor | Sequence[Tensor],
    n: int,
    m: int,
    *,
    dims: int | Sequence[int] = 1,
    absolute: bool = False,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """Packed masks that keep the n largest of every m consecutive scores along a dimension.

    Groups begin at index 0. If r < m scores are left over at the end of the dimension, they keep
    `ceil(r * n / m)`, so that no part of a tensor is sparser than asked for. A dimension of I
    scores therefore keeps `I // m * n + ceil(I % m * n / m)` at every position of the others.

    Args:
        scores: a tensor or a list, float32, float16, bfloat16 or float64, any strides. Signed
            values are compared.
        n, m: 1 <= n <= m.
        dims: the dimension that groups run along, one for all tensors or one each. Of a Linear
            weight `[out, in]` and a convolution `[out, in / groups, *kernel]` it is 1.
        absolute: compare magnitudes.
        names: of the tensors, for errors.

    Returns:
        One uint8 tensor `[ceil(numel / 8)]` for each tensor (see `pack_mask`). Ties keep the lower
        index.

    Raises:
        ValueError: n, m or dims out of range.
        NonFiniteScoreError: NaN, named. Infinities rank by value. -0 equals +0.

    Source: Mishra et al. 2021 (arXiv:2104.08378), section 3, for 2:4.

    Example:
        >>> import torch
        >>> nm_mask(torch.tensor([[1.0, 4.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]]), 2, 4)
        [tensor([54], dtype=torch.uint8)]
    """
    tensors = check_scores("nm_mask", scores)
    along = check_groups("nm_mask", tensors, n, m, dims)
    check_names("nm_mask", names, len(tensors))
    if not tensors:
        return []
    with named_nan(names):
        made: list[Tensor] = run("nm_mask", tensors, tensors, n, m, along, absolute)
        return made


def check_groups(
    operation: str, tensors: Sequence[Tensor], n: int, m: int, dims: int | Sequence[int]
) -> list[int]:
    """n, m and dims in range; returns one dimension >= 0 for each tensor."""
    if not 1 <= n <= m:
        raise ValueError(f"{operation}: n:m needs 1 <= n <= m, got {n}:{m}")
    if isinstance(dims, Sequence):
        along = [operator.index(dim) for dim in dims]
    else:
        along = [operator.index(dims)] * len(tensors)
    if len(along) != len(tensors):
        raise ValueError(f"{operation}: {len(along)} dims for {len(tensors)} tensors")
    for index, (dim, tensor) in enumerate(zip(along, tensors, strict=True)):
        if not -tensor.dim() <= dim < tensor.dim():
            raise ValueError(
                f"{operation}: dims[{index}] is {dim}, but scores[{index}] has the shape "
                f"{tuple(tensor.shape)}"
            )
    return [dim % tensor.dim() for dim, tensor in zip(along, tensors, strict=True)]
