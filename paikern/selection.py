"""Scores -> packed masks: exact counts, the published threshold rule, and collapsed layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paikern import ops
from paikern.errors import PaikernWarning, SparsityError
from paikern.pattern import Pattern
from paikern.scores import Dense, Factored, Product, Scores
from paikern.structured import select_structured

RULES = ("exact", "published")
#: Threshold rules of published codes, with k weights to keep and z = N - k to remove.
PUBLISHED = {
    "above_removed": "keeps scores above the z-th smallest (Synaptic-Flow)",
    "at_least_kept": "keeps scores from the k-th largest up, ties with it too (SNIP, FORCE)",
    "at_least_removed": "keeps scores from the z-th smallest up, that one too (GraSP)",
    "above_kept": "keeps candidates above the k-th largest, that one not (CroP)",
}
ON_COLLAPSE = ("warn", "raise", "floor")


def select_packed(
    scores: Scores,
    counts: int | Sequence[int],
    rule: str = "exact",
    pattern: Pattern | None = None,
) -> dict[str, Tensor]:
    """The packed masks that keep `counts` weights: one number over all layers, or one a layer.

    "exact" keeps exactly that many; ties go to the lower global index (layer order, then
    row-major). The rules of `PUBLISHED` exist for comparison; "published" is "above_removed". A
    pattern is selected as `paikern.structured.select_structured` says.

    Raises:
        NonFiniteScoreError: NaN scores, named by parameter.
    """
    if pattern is not None:
        return select_structured(scores, counts, pattern)
    names = list(scores)
    entries = [scores[name] for name in names]
    k: int | list[int] = counts if isinstance(counts, int) else list(counts)
    if rule != "exact":
        return _by_threshold(scores, k, "above_removed" if rule == "published" else rule)
    factored = [e for e in entries if isinstance(e, Factored)]
    if len(factored) == len(entries) and len({e.power for e in factored}) == 1:
        packed = ops.topk_mask_factored(
            [e.weight for e in factored],
            [e.a for e in factored],
            [e.g for e in factored],
            [e.exponent for e in factored],
            k,
            power=factored[0].power,
            masks=[e.mask for e in factored],
            convs=[e.conv for e in factored],
            names=names,
        )
        return dict(zip(names, packed, strict=True))
    products = [e for e in entries if isinstance(e, Product)]
    if len(products) == len(entries):
        packed = ops.topk_mask_product(
            [e.weight for e in products],
            [e.gradient for e in products],
            k,
            masks=[e.mask for e in products],
            names=names,
        )
        return dict(zip(names, packed, strict=True))
    masks = [None if isinstance(e, Dense) else e.mask for e in entries]
    dense = [e if isinstance(e, Dense) else e.dense() for e in entries]
    absolute = any(e.absolute for e in dense)
    if absolute and not all(
        e.absolute or not isinstance(s, Dense) for e, s in zip(dense, entries, strict=True)
    ):
        dense = [
            replace(e, values=e.values.abs(), absolute=False) if e.absolute else e for e in dense
        ]
        absolute = False
    packed = ops.topk_mask(
        [e.values for e in dense],
        k,
        exponents=[e.exponent for e in dense] if any(e.exponent for e in dense) else None,
        absolute=absolute,
        masks=masks,
        names=names,
    )
    return dict(zip(names, packed, strict=True))


def _by_threshold(scores: Scores, k: int | list[int], rule: str) -> dict[str, Tensor]:
    top = scores.exponent
    values = [scores.dense(name, torch.float64, relative_to=top) for name in scores]
    if isinstance(k, int):
        flat = torch.cat([v.flatten() for v in values])
        masks = [_kept(v, flat, k, rule) for v in values]
    else:
        masks = [_kept(v, v.flatten(), n, rule) for v, n in zip(values, k, strict=True)]
    for name, mask in zip(scores, masks, strict=True):
        score = scores[name]
        if not isinstance(score, Dense) and score.mask is not None:
            mask &= ops.unpack_mask(score.mask.to(mask.device), tuple(mask.shape))
    nan = [name for name, v in zip(scores, values, strict=True) if bool(torch.isnan(v).any())]
    if nan:
        verb = "keeps" if rule == "above_removed" else "prunes"
        warnings.warn(
            f"selection='published' {verb} NaN scores, as the published codes do: {', '.join(nan)}",
            PaikernWarning,
            stacklevel=2,
        )
    if not any(bool(m.any()) for m in masks):
        raise SparsityError(
            "selection='published' prunes every weight: all scores tie at the threshold; "
            "use selection='exact'"
        )
    return {name: ops.pack_mask(m) for name, m in zip(scores, masks, strict=True)}


def _kept(values: Tensor, ranked: Tensor, k: int, rule: str) -> Tensor:
    """What `rule` keeps of `values`, its threshold being one of the scores `ranked`, `[n]`."""
    n = ranked.numel()
    if n == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if rule in ("above_removed", "at_least_removed"):
        if k >= n:
            return torch.ones_like(values, dtype=torch.bool)
        threshold = ranked.kthvalue(n - k).values
        return ~(values <= threshold) if rule == "above_removed" else values >= threshold
    threshold = ranked.kthvalue(n - max(k, 1) + 1).values
    return values > threshold if rule == "above_kept" else values >= threshold


def other_count(kept: int, counts: int | Sequence[int]) -> str | None:
    """What to tell where selection="published" keeps another number than `counts` ask for.

    Its rules differ from them by one for each budget; further off, by more than a hundredth, they
    are where many scores tie at the threshold and stay or go together.
    """
    asked = counts if isinstance(counts, int) else sum(counts)
    budgets = 1 if isinstance(counts, int) else len(counts)
    if abs(kept - asked) <= max(budgets, asked // 100):
        return None
    return (
        f"selection='published' keeps {kept} weights where {asked} were asked for: scores that tie "
        "at the threshold stay or go together; use selection='exact' for the exact number"
    )


def empty_layers(packed: Mapping[str, Tensor]) -> list[str]:
    """Layers that keep no weight."""
    return [name for name, bits in packed.items() if bits.numel() and not bool(bits.any())]


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message, cut where a large model would fill the screen."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def with_floor(
    scores: Scores,
    packed: dict[str, Tensor],
    k: int | Sequence[int],
    pattern: Pattern | None = None,
) -> dict[str, Tensor]:
    """Give each empty layer its best weight or block, taken from the globally weakest kept ones.

    The total stays k, or within a block of it. Layers with a budget of their own (k a list) are
    not touched: a budget of 0 is raised to 1 where budgets are made.
    """
    if not isinstance(k, int):
        return packed
    alive: dict[str, Tensor] = {}
    while empty := [name for name in empty_layers(packed) if name not in alive]:
        for name in empty:
            alive[name] = select_packed(scores.only(name), 1, pattern=pattern)[name]
        taken = sum(
            int(ops.unpack_mask(bits, scores.shapes[name]).sum()) for name, bits in alive.items()
        )
        if taken > k:
            what = "weight" if pattern is None else f"{pattern} of weights"
            raise SparsityError(
                f"on_collapse='floor' needs at least one {what} for each of {len(alive)} layers, "
                f"but only {k} are kept; lower the sparsity"
            )
        # An empty layer's best ranks below all that are kept, so it can be set apart.
        packed = select_packed(scores, k - taken, pattern=pattern)
        for name, best in alive.items():
            packed[name] = packed[name] | best
    return packed


def apply_collapse_rule(
    scores: Scores,
    packed: dict[str, Tensor],
    k: int | Sequence[int],
    on_collapse: str,
    pattern: Pattern | None = None,
) -> dict[str, Tensor]:
    """Act on layers that a selection empties; "warn" is left to the end of the run."""
    empty = empty_layers(packed)
    if not empty or on_collapse == "warn":
        return packed
    if on_collapse == "raise":
        raise collapsed(empty)
    return with_floor(scores, packed, k, pattern)


def collapsed(empty: Sequence[str]) -> SparsityError:
    return SparsityError(
        f"layer collapse: {listed(empty)} would keep no weight; use more rounds, a lower "
        "sparsity, scope='erk', or on_collapse='floor'"
    )
