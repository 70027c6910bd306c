"""path_score: the score of every weight of a linear layer."""

from __future__ import annotations

from torch import Tensor

from paikern.ops._library import define, fake
from paikern.ops._path import check_map, check_weight, result_dtype, run

define(
    "path_score(Tensor weight, Tensor x, Tensor g, int power, Tensor? mask, float pruned) -> Tensor"
)


@fake("path_score")
def _shape(
    weight: Tensor, x: Tensor, g: Tensor, power: int, mask: Tensor | None, pruned: float
) -> Tensor:
    return x.new_empty(weight.shape, dtype=result_dtype(weight, power, x, g))


def path_score(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    *,
    power: int = 1,
    mask: Tensor | None = None,
    pruned: float = 0.0,
) -> Tensor:
    """`weight.abs()**power * (g.T @ x)`, and `pruned` where the mask has a 0 bit.

    Args:
        weight, power, mask: as in `path_forward`.
        x: `[in]` or `[batch, in]`, paths that come in. g: `[out]` or `[batch, out]`, paths that go
            out; both finite and of the same batch.
        pruned: the score of pruned weights, -1 where they must rank below a score of 0.

    Returns:
        `[out, in]` float32 (float64 where a tensor that is read is). Not differentiable. Where a
        rank-one score of one vector is to be selected, `topk_mask_factored` needs no score tensor.

    Raises:
        ValueError: shapes that do not fit, another power. TypeError: not float tensors.

    Source: SynFlow, Tanaka et al. 2020 (arXiv:2006.05467), equation 2.

    Example:
        >>> import torch
        >>> w = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
        >>> path_score(w, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]))
        tensor([[ 3., 12.],
                [ 0.,  6.]])
    """
    check_weight("path_score", weight, power, mask)
    check_map("path_score", "x", x, weight.shape[-1], weight)
    check_map("path_score", "g", g, weight.shape[0], weight)
    if x.shape[:-1] != g.shape[:-1]:
        raise ValueError(
            f"path_score: x {tuple(x.shape)} and g {tuple(g.shape)} must have the same batch"
        )
    return run("path_score", weight, x, g, power, mask, pruned)
