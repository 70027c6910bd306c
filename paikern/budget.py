"""How many weights to keep: in the whole model, in each layer, and in each round.

Counts are plain integers made in float64, so they are the same on every machine; the only tensors
here are the scores that LAMP needs.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from paikern.errors import NonFiniteScoreError, SparsityError
from paikern.pattern import Layout

__all__ = [
    "SCHEDULES",
    "SCOPES",
    "erk_densities",
    "falling_budgets",
    "keep_count",
    "layer_budget",
    "resolve_sparsity",
    "schedule_counts",
    "schedule_densities",
]

Shapes: TypeAlias = "Mapping[str, Sequence[int]] | Sequence[Sequence[int]]"
LayerScores: TypeAlias = "Mapping[str, Tensor] | Sequence[Tensor]"

SCOPES = ("global", "local", "uniform", "row", "erk", "lamp")
ERK_VARIANTS = ("paper", "published", "npb")
#: What the sparsity of a density below 2**-54 rounds to; one weight is kept of any number.
_BELOW_ONE = math.nextafter(1.0, 0.0)


def keep_count(n: int, sparsity: float) -> int:
    """Weights kept of ``n``: ``n - floor(sparsity * n)``, the product in float64.

    >>> keep_count(270_896, 0.98)
    5418
    """
    return n - math.floor(float(sparsity) * n)


def resolve_sparsity(
    sparsity: float | None = None,
    density: float | None = None,
    amount: float | None = None,
    compression: float | None = None,
    *,
    total: int | None = None,
) -> float:
    """The fraction of weights to remove, in ``[0, 1)``, from whichever one of the four is given.

    Args:
        sparsity: fraction removed, in ``[0, 1)``.
        density: fraction kept, in ``(0, 1]``.
        amount: as in ``torch.nn.utils.prune``: a float is a sparsity, an int a number of weights
            to remove, which needs ``total``.
        compression: ``1 / density`` (a factor, not a logarithm), at least 1.
        total: number of prunable weights.

    Raises:
        SparsityError: none or several given, not finite, or out of range.
        TypeError: not a number.

    >>> resolve_sparsity(compression=10), resolve_sparsity(density=0.25)
    (0.9, 0.75)
    """
    given = {
        name: value
        for name, value in (
            ("sparsity", sparsity),
            ("density", density),
            ("amount", amount),
            ("compression", compression),
        )
        if value is not None
    }
    if len(given) != 1:
        got = " and ".join(f"{name}={value}" for name, value in given.items()) or "none"
        raise SparsityError(
            f"give exactly one of sparsity, density, amount, compression; got {got}"
        )
    name, value = next(iter(given.items()))
    # Booleans are ints to Python, and True would pass as "remove one weight".
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if name == "density":
        if not 0 < value <= 1:
            raise SparsityError(f"density must be in (0, 1], the fraction kept; got {value}")
        return min(1.0 - value, _BELOW_ONE)
    if name == "compression":
        if not 1 <= value < math.inf:
            raise SparsityError(
                f"compression must be a finite factor of at least 1 (10 keeps a tenth); got {value}"
            )
        return min(1.0 - 1.0 / value, _BELOW_ONE)
    if name == "amount" and isinstance(value, int):
        return _count_to_sparsity(value, total)
    if not 0 <= value < 1:
        hint = f"; for {value} % write {value / 100}" if 1 < value < 100 else ""
        raise SparsityError(f"{name} must be in [0, 1), the fraction removed; got {value}{hint}")
    return float(value)


def _count_to_sparsity(amount: int, total: int | None) -> float:
    """The fraction from which ``keep_count`` gets exactly ``total - amount``."""
    if total is None:
        raise SparsityError(
            f"amount={amount} is a number of weights and needs total; for a fraction write a float"
        )
    if not 0 <= amount < max(total, 1):
        raise SparsityError(f"amount must be in [0, {total}), the weights to remove; got {amount}")
    sparsity = amount / total if total else 0.0
    if math.floor(sparsity * total) < amount:  # the quotient was rounded down
        sparsity = math.nextafter(sparsity, 1.0)
    return sparsity


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Erdős-Rényi-Kernel density of each layer (Mocanu et al. 2018, Evci et al. 2020).

    A layer's density is proportional to ``sum(shape) / prod(shape)``, kernel dimensions included.
    Layers for which that exceeds 1 are made dense and the rest shares what is left, until no layer
    exceeds 1. ``sum(density_l * n_l)`` is ``density * sum(n_l)`` up to rounding. An empty layer
    counts as dense.

    Raises:
        SparsityError: density outside (0, 1].

    >>> [round(d, 4) for d in erk_densities([(300, 784), (100, 300), (10, 100)], 0.1)]
    [0.0796, 0.2302, 1.0]
    """
    if not 0 < density <= 1:
        raise SparsityError(f"erk_densities: density must be in (0, 1], got {density}")
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / n if n else math.inf for shape, n in zip(shapes, sizes, strict=True)]
    dense = {layer for layer, n in enumerate(sizes) if n == 0}
    while len(dense) < len(sizes):
        rest = [layer for layer in range(len(sizes)) if layer not in dense]
        budget = sum(sizes[layer] * density for layer in rest)
        budget -= sum(sizes[layer] * (1 - density) for layer in dense)
        scale = budget / sum(raw[layer] * sizes[layer] for layer in rest)
        largest = max(raw[layer] for layer in rest)
        if scale * largest <= 1:
            return [1.0 if layer in dense else scale * r for layer, r in enumerate(raw)]
        dense.update(layer for layer in rest if raw[layer] == largest)
    return [1.0] * len(sizes)


def layer_budget(
    shapes: Shapes,
    sparsity: float,
    scope: str = "global",
    *,
    variant: str = "paper",
    scores: LayerScores | None = None,
    layouts: Mapping[str, Layout] | None = None,
) -> int | list[int]:
    """Weights to keep: one number for all layers together, or one for each layer.

    ====================  ==========================================================================
    scope                 result
    ====================  ==========================================================================
    ``global``            one k = ``keep_count(N, sparsity)`` over all layers
    ``local``/``uniform`` ``keep_count(n_l, sparsity)`` each; rounded up layer by layer, so the sum
                          exceeds ``keep_count(N, sparsity)`` by less than the number of layers
    ``row``               ``keep_count(n_l / outputs, sparsity)`` for every output; rounded up
                          row by row
    ``erk``               :func:`erk_densities`. ``paper``: rounded down, the rest handed out by
                          largest fractional part (lower layer first on ties), at least one weight a
                          layer, sum exactly ``keep_count(N, sparsity)``. ``published``:
                          ``n_l - int((1 - density_l) * n_l)``; ``npb``: ``ceil`` of
                          ``(1 - sparsity_l) * n_l``; both exceed the sum slightly
    ``lamp``              counts of the k best weights by LAMP score, exact sum; needs ``scores``
    ====================  ==========================================================================

    LAMP (Lee et al. 2021) divides the square of a score by the sum of the squares of that score and
    all larger ones of its layer. Equal scores: the lower index counts as larger. Layers tie in
    layer order. Every layer with a nonzero score keeps one weight as long as k allows.

    Args:
        shapes: name -> shape, or a list of shapes, in layer order.
        sparsity: fraction removed, in ``[0, 1)``.
        scope: one of the table.
        variant: rounding of ``erk``.
        scores: for ``lamp``, in the order (or with the names) of ``shapes``; compared by absolute
            value.
        layouts: for ``row``, by name: where the outputs are; ``[out, in, ...]`` if left out.

    Raises:
        SparsityError: sparsity out of range, or fewer weights than layers in ``erk``.
        ValueError: unknown scope or variant, missing scores or scores of another shape.
        NonFiniteScoreError: NaN or infinity among the LAMP scores.

    >>> layer_budget({"a": (300, 784), "b": (100, 300), "c": (10, 100)}, 0.9, "erk")
    [18714, 6906, 1000]
    """
    sparsity = resolve_sparsity(sparsity=sparsity)
    if scope not in SCOPES:
        raise ValueError(_unknown("scope", scope, SCOPES))
    names = list(shapes) if isinstance(shapes, Mapping) else [str(i) for i in range(len(shapes))]
    dims = list(shapes.values()) if isinstance(shapes, Mapping) else list(shapes)
    sizes = [math.prod(shape) for shape in dims]
    if scope == "global":
        return keep_count(sum(sizes), sparsity)
    if scope in {"local", "uniform"}:
        return [keep_count(n, sparsity) for n in sizes]
    if scope == "row":
        outputs = [
            (layouts or {}).get(name, Layout()).outputs(shape) if len(shape) > 1 else 1
            for name, shape in zip(names, dims, strict=True)
        ]
        return [
            rows * keep_count(n // rows, sparsity) if n else 0
            for rows, n in zip(outputs, sizes, strict=True)
        ]
    if scope == "erk":
        return _erk_counts(dims, sizes, sparsity, variant)
    if scores is None:
        raise ValueError("layer_budget: scope 'lamp' ranks scores; pass scores=")
    tensors = [scores[n] for n in names] if isinstance(scores, Mapping) else list(scores)
    found = [tuple(t.shape) for t in tensors]
    if found != [tuple(shape) for shape in dims]:
        raise ValueError(
            f"layer_budget: scores must have the shapes of the layers, got {found} for {dims}"
        )
    return _lamp_counts(names, tensors, keep_count(sum(sizes), sparsity))


def _erk_counts(
    shapes: Sequence[Sequence[int]], sizes: list[int], sparsity: float, variant: str
) -> list[int]:
    if variant not in ERK_VARIANTS:
        raise ValueError(_unknown("variant", variant, ERK_VARIANTS))
    densities = erk_densities(shapes, 1.0 - sparsity)
    layers = list(zip(densities, sizes, strict=True))
    if variant == "published":
        return [n - int((1.0 - d) * n) for d, n in layers]
    if variant == "npb":
        return [math.ceil((1.0 - (1.0 - d)) * n) for d, n in layers]

    total = keep_count(sum(sizes), sparsity)
    lowest = [min(1, n) for n in sizes]
    if total < sum(lowest):
        raise SparsityError(
            f"layer_budget: erk keeps at least one weight in each of {sum(lowest)} layers, but "
            f"sparsity={sparsity} keeps {total} of {sum(sizes)}; lower the sparsity"
        )
    quotas = [d * n for d, n in layers]
    counts = [
        min(max(math.floor(q), low), n) for q, low, n in zip(quotas, lowest, sizes, strict=True)
    ]
    by_fraction = sorted(range(len(sizes)), key=lambda i: (math.floor(quotas[i]) - quotas[i], i))
    # The floors leave less than one weight a layer to hand out. Lifting tiny layers to one weight
    # can overdraw instead; then the smallest fractions give back.
    while (rest := total - sum(counts)) != 0:
        step = 1 if rest > 0 else -1
        order = by_fraction if rest > 0 else by_fraction[::-1]
        for layer in order:
            if rest != 0 and lowest[layer] <= counts[layer] + step <= sizes[layer]:
                counts[layer] += step
                rest -= step
    return counts


def _lamp_counts(names: Sequence[str], scores: Sequence[Tensor], k: int) -> list[int]:
    ranked = [_lamp_descending(name, tensor) for name, tensor in zip(names, scores, strict=True)]
    if k == sum(values.numel() for values in ranked):
        return [values.numel() for values in ranked]
    # Non-negative doubles order like their bits, so 63 halvings find the k-th largest value exactly
    # without sorting the layers together. LAMP scores are at most 1.
    keys = [-values.view(torch.int64) for values in ranked]  # ascending

    def at_least(key: int) -> list[int]:
        bound = torch.tensor([-key])
        return [int(torch.searchsorted(layer, bound, right=True)) for layer in keys]

    low, high = 0, int(torch.tensor(1.0, dtype=torch.float64).view(torch.int64)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(at_least(middle)) >= k else (low, middle)
    counts = at_least(high)  # strictly above the k-th value
    rest = k - sum(counts)
    for layer, reachable in enumerate(at_least(low)):
        extra = min(rest, reachable - counts[layer])
        counts[layer] += extra
        rest -= extra
    return counts


def _lamp_descending(name: str, scores: Tensor) -> Tensor:
    """LAMP scores of one layer in float64, largest first: ``s_j^2 / sum_{i<=j} s_i^2``."""
    values = scores.detach().reshape(-1).to("cpu", torch.float64).abs()
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteScoreError(
            f"layer_budget: lamp needs finite scores, '{name}' has {bad} NaN or infinite; rescale"
        )
    if values.numel() == 0:
        return values
    values = values.sort(descending=True).values
    # Any common factor cancels; dividing by the largest keeps the squares from overflowing.
    squares = (values / values[0]).square() if values[0] > 0 else values
    total = squares.cumsum(0)
    return torch.where(total > 0, squares / total, squares)


def _exponential(density: float, t: float) -> float:
    return math.pow(density, t)


def _linear(density: float, t: float) -> float:
    return 1.0 - (1.0 - density) * t


def _cubic(density: float, t: float) -> float:
    return 1.0 - (1.0 - density) * (1.0 - (1.0 - t) ** 3)


def _expinv(density: float, t: float) -> float:
    return 1.0 - math.pow(1.0 - density, 1.0 / t)


def _halving(density: float, rounds: int) -> list[float]:
    sparsity = 1.0 - density
    steps = [sparsity - (sparsity - 0.5) * 0.5**r for r in range(rounds - 1)]
    return [1.0 - step for step in steps if step < sparsity] + [density]


_CURVES: dict[str, Callable[[float, float], float]] = {
    "exponential": _exponential,
    "linear": _linear,
    "cubic": _cubic,
    "expinv": _expinv,
}
SCHEDULES = (*_CURVES, "halving", "one-shot")


def schedule_densities(density: float, rounds: int, kind: str = "exponential") -> list[float]:
    """Density after each of ``rounds`` pruning rounds; the last is ``density`` itself.

    With t = (r + 1) / rounds: ``exponential`` d^t; ``linear`` 1 - (1 - d) t; ``cubic``
    1 - (1 - d)(1 - (1 - t)^3) (Zhu & Gupta 2017); ``expinv`` 1 - (1 - d)^(1 / t) (NTK-SAP);
    ``halving`` sparsities s - (s - 1/2) / 2^r (CroPit), rounds that would pass s left out: a single
    one for s up to 1/2; ``one-shot`` is the single round.

    Raises:
        SparsityError: density outside (0, 1], rounds below 1, one-shot with several rounds.
        ValueError: unknown kind.

    >>> schedule_densities(0.0625, 4)
    [0.5, 0.25, 0.125, 0.0625]
    >>> schedule_densities(0.25, 3, "halving")
    [0.5, 0.375, 0.25]
    """
    if kind not in SCHEDULES:
        raise ValueError(_unknown("schedule", kind, SCHEDULES))
    if not 0 < density <= 1:
        raise SparsityError(f"schedule: density must be in (0, 1], got {density}")
    if isinstance(rounds, bool) or not isinstance(rounds, int):
        raise TypeError(f"rounds must be an integer, got {type(rounds).__name__} {rounds!r}")
    if rounds < 1:
        raise SparsityError(f"rounds must be at least 1, got {rounds}")
    if kind == "one-shot" and rounds != 1:
        raise SparsityError(
            f"schedule 'one-shot' has one round, got rounds={rounds}; use 'exponential'"
        )
    if kind == "halving":
        return _halving(density, rounds)
    curve = _CURVES.get(kind, _exponential)
    return [curve(density, (r + 1) / rounds) for r in range(rounds - 1)] + [density]


def schedule_counts(n: int, sparsity: float, rounds: int, kind: str = "exponential") -> list[int]:
    """Weights kept of ``n`` after each round: never increasing, last ``keep_count(n, sparsity)``.

    Rounds before the last keep ``n - int((1 - d_r) * n)`` with :func:`schedule_densities`.

    >>> schedule_counts(1000, 0.9, 3, "linear")
    [700, 400, 100]
    """
    sparsity = resolve_sparsity(sparsity=sparsity)
    last = keep_count(n, sparsity)
    counts: list[int] = []
    for density in schedule_densities(1.0 - sparsity, rounds, kind)[:-1]:
        # Neighbouring densities can round past each other by one weight; the bounds undo that.
        count = n - int((1.0 - density) * n)
        counts.append(max(last, min(count, counts[-1] if counts else n)))
    return [*counts, last]


def falling_budgets(budgets: Sequence[Sequence[int]]) -> list[list[int]]:
    """Budgets of successive rounds, `[rounds][layers]`, in which no layer's ever grows.

    The largest fractional part of ERK falls on another layer from round to round, so that a layer
    could be given a weight more than it has left, and one that was pruned would return. From the
    last round, which stays as it is, backwards: a layer that is below its next budget is raised to
    it, and layers that have most above theirs make up for it, so that totals stay the same as long
    as they fall.

    >>> falling_budgets([[3, 5], [2, 4], [3, 1]])
    [[3, 5], [3, 3], [3, 1]]
    """
    found = [list(counts) for counts in budgets]
    for counts, after in zip(found[-2::-1], found[:0:-1], strict=True):
        short = sum(max(0, least - count) for count, least in zip(counts, after, strict=True))
        counts[:] = map(max, counts, after)
        for _ in range(short):
            most = max(range(len(counts)), key=lambda layer: counts[layer] - after[layer])
            if counts[most] == after[most]:
                break
            counts[most] -= 1
    return found


def _unknown(what: str, value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} '{value}'; {hint}"
