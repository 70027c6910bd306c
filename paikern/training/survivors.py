"""Which weights stay by magnitude, among those that are still there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from paikern import ops
from paikern.errors import NonFiniteScoreError, PaikernWarning
from paikern.masks import MaskSet
from paikern.scores import Dense, Scores
from paikern.selection import apply_collapse_rule, empty_layers, listed


def keep_largest(
    weights: Mapping[str, Tensor],
    masks: MaskSet,
    k: int,
    *,
    on_collapse: str,
    when: str,
    memory: Tensor | None = None,
) -> dict[str, Tensor]:
    """The packed masks of the `k` largest |w| of all survivors; ties go to the lower index.

    Args:
        weights: by name, in the order that breaks ties.
        masks: who survived so far; nobody comes back.
        k: how many are kept, at most as many as survived.
        on_collapse: for layers that this empties: "warn", "raise" or "floor".
        when: the epoch or level, for messages.
        memory: as in `ops.topk_mask`: where the last threshold was.

    Raises:
        NonFiniteScoreError: NaN among the survivors.
        SparsityError: an emptied layer, with on_collapse="raise".
    """
    names = list(weights)
    tensors = [weights[name] for name in names]
    survivors = None
    if masks.kept < masks.total:
        survivors = [masks.packed(name).to(weights[name].device) for name in names]
    try:
        found = ops.topk_mask(
            tensors, k, absolute=True, masks=survivors, memory=memory, names=names
        )
    except NonFiniteScoreError as error:
        raise NonFiniteScoreError(f"{when}: {error}") from None
    packed = dict(zip(names, found, strict=True))
    before = set(empty_layers({name: masks.packed(name) for name in names}))
    empty = [name for name in empty_layers(packed) if name not in before]
    if empty and on_collapse == "warn":
        verb = "keeps" if len(empty) == 1 else "keep"
        warnings.warn(
            f"layer collapse, {when}: {listed(empty)} {verb} no weight; use a lower sparsity or "
            "on_collapse='floor'",
            PaikernWarning,
            stacklevel=5,
        )
    elif empty:
        entries = {n: Dense(w.abs() * masks[n].to(w.device)) for n, w in weights.items()}
        scores = Scores(entries, masks.shapes)
        packed = apply_collapse_rule(scores, packed, k, on_collapse)
    return packed
