"""path_sweep: the adjoint of a linear layer and the bits of its scores, in one read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paikern.ops._library import define, fake
from paikern.ops._path import check_float, check_weight, result_dtype, run
from paikern.ops.topk_mask import named_nan

define(
    "path_sweep(Tensor weight, Tensor a, Tensor g, float threshold, int power, Tensor? mask) "
    "-> (Tensor, Tensor, Tensor)"
)


@fake("path_sweep")
def _shape(
    weight: Tensor, a: Tensor, g: Tensor, threshold: float, power: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        g.new_empty(weight.shape[1], dtype=result_dtype(weight, power, g)),
        weight.new_empty((weight.numel() + 7) // 8, dtype=torch.uint8),
        weight.new_empty((), dtype=torch.int64),
    )


def path_sweep(
    weight: Tensor,
    a: Tensor,
    g: Tensor,
    threshold: float,
    *,
    power: int = 1,
    mask: Tensor | None = None,
    name: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward half of a pruning round for one layer: `V^T g` and `V * g a^T > threshold`.

    `V = weight.abs()**power * unpack_mask(mask)`. The weight is read once and nothing of its size
    is made but the bits.

    Args:
        weight, power, mask: as in `path_forward`.
        a: `[in]`, paths that come in. g: `[out]`, paths that go out. Any float dtype.
        threshold: scores above it get their bit; scores equal to it do not. Compared exactly, also
            where it is no float32.
        name: the parameter's name, for errors.

    Returns:
        x: `[in]`, the bits of `path_backward(weight, g)`.
        packed: the packed mask of the scores `((|w|**p) * a[i]) * g[o]`, float32 in this order as
            in `topk_mask_factored`; pruned weights have a 0 bit whatever the threshold.
        kept: int64 scalar tensor, how many bits are set.
        The same for every number of threads. Not differentiable.

    Raises:
        ValueError: shapes that do not fit, another power, a threshold that is NaN.
        TypeError: not float tensors.
        NonFiniteScoreError: the score of a weight that is not pruned is NaN (infinity times 0).

    Source: SynFlow, Tanaka et al. 2020 (arXiv:2006.05467), equation 2 and algorithm 1.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
        >>> a, g = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 10.0])  # scores [[2, 3], [40, 5]]
        >>> path_sweep(w, a, g, 3.0)
        (tensor([21.,  8.]), tensor([12], dtype=torch.uint8), tensor(2))
    """
    check_weight("path_sweep", weight, power, mask)
    if weight.dim() != 2:
        raise ValueError(f"path_sweep: weight must be [out, in], got shape {tuple(weight.shape)}")
    for argument, value, length in (("a", a, weight.shape[1]), ("g", g, weight.shape[0])):
        if tuple(value.shape) != (length,):
            raise ValueError(
                f"path_sweep: {argument} must be [{length}] for a weight of shape "
                f"{tuple(weight.shape)}, got {tuple(value.shape)}"
            )
        check_float("path_sweep", argument, value)
    bound = float(threshold)
    if math.isnan(bound):
        raise ValueError("path_sweep: threshold must be a number, got nan")
    with named_nan(None if name is None else [name]):
        return run("path_sweep", weight, a, g, bound, power, mask)
