"""nm_mask_factored: of every m consecutive rank-one scores, which never exist, the n largest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.nm_mask import check_groups
from paikern.ops.topk_mask import check_names, check_scores, named_nan
from paikern.ops.unpack_mask import check_packed

define(
    "nm_mask_factored(Tensor[] weights, Tensor[] a, Tensor[] g, Tensor[] masks, int n, int m, "
    "int[] dims, int power) -> Tensor[]"
)


@fake("nm_mask_factored")
def _shape(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    n: int,
    m: int,
    dims: Sequence[int],
    power: int,
) -> list[Tensor]:
    return [w.new_empty((w.numel() + 7) // 8, dtype=torch.uint8) for w in weights]


def nm_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    n: int,
    m: int,
    *,
    power: int = 1,
    dims: int | Sequence[int] = 1,
    masks: Sequence[Tensor | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Tensor]:
    """`nm_mask` of `|w[o, i]|**power * a[i] * g[o]`, no score tensor made.

    The score is computed in float32 as `((|w|**power) * a[i]) * g[o]`, as everywhere; `g` matters
    within a group where it is 0 or the product leaves the range of float32.

    Args:
        weights: `[out, in]` each, float32, float16 or bfloat16, any strides.
        a: `[in]` each, g: `[out]` each; used in float32, at least 0.
        n, m, dims, names: as in `nm_mask`.
        power: 1 or 2.
        masks: packed masks of the candidates, or None each: other weights rank below them, tied,
            and NaN among them does not count.

    Returns:
        One packed mask for each weight.

    Raises:
        ValueError: shapes, lists, n or m that do not fit.
        NonFiniteScoreError: a candidate's score is NaN (infinity times 0), named.

    Example:
        >>> import torch
        >>> w, a, g = torch.tensor([[1.0, -3.0, 2.0, 1.0]]), torch.arange(4.0), torch.ones(1)
        >>> nm_mask_factored([w], [a], [g], 2, 4)  # scores 0, 3, 4, 3
        [tensor([6], dtype=torch.uint8)]
    """
    held = check_scores("nm_mask_factored", weights)
    candidates = list(masks) if masks is not None else [None] * len(held)
    if not len(held) == len(a) == len(g) == len(candidates):
        raise ValueError(
            f"nm_mask_factored: {len(held)} weights, {len(a)} a, {len(g)} g and "
            f"{len(candidates)} masks; give one of each a layer"
        )
    for index, (w, x, y, kept) in enumerate(zip(held, a, g, candidates, strict=True)):
        check_factors("nm_mask_factored", f"layer {index}", w, x, y, kept, power)
    along = check_groups("nm_mask_factored", held, n, m, dims)
    check_names("nm_mask_factored", names, len(held))
    if not held:
        return []
    none = torch.empty(0, dtype=torch.uint8, device=held[0].device)
    with named_nan(names):
        made: list[Tensor] = run(
            "nm_mask_factored",
            [*held, *a, *g],
            held,
            list(a),
            list(g),
            [none if kept is None else kept for kept in candidates],
            n,
            m,
            along,
            power,
        )
        return made


def check_factors(
    operation: str, layer: str, w: Tensor, a: Tensor, g: Tensor, mask: Tensor | None, power: int
) -> None:
    """Shapes of a rank-one score and its candidates."""
    if power not in (1, 2):
        raise ValueError(f"{operation}: power must be 1 or 2, got {power}")
    if w.dim() != 2 or tuple(a.shape) != w.shape[1:] or tuple(g.shape) != w.shape[:1]:
        raise ValueError(
            f"{operation}: {layer} needs weight [out, in], a [in], g [out], got "
            f"{tuple(w.shape)}, {tuple(a.shape)}, {tuple(g.shape)}"
        )
    if mask is not None:
        check_packed(operation, mask, w.numel())
