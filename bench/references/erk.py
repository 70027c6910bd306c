"""ERK layer quotas: how many weights each layer keeps.

    raw_l = sum(dims of W_l) / prod(dims of W_l)           kernel dims included
    density_l = min(1, eps * raw_l),  eps such that sum(density_l * n_l) = density * N

A layer whose density would exceed 1 becomes dense and eps is solved again for the others; all
layers with the same largest raw value go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = Sequence[int]


def erk_densities(shapes: Sequence[Shape], sparsity: float) -> list[float]:
    """Return each layer's density in float64; `sum(density * numel)` is `(1 - sparsity) * N`."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"erk_densities: sparsity must be in [0, 1), got {sparsity}")
    density = 1.0 - sparsity
    numels = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while len(dense) < len(shapes):
        rest = [layer for layer in range(len(shapes)) if layer not in dense]
        budget = sum(numels[layer] * density for layer in rest)
        budget -= sum(numels[layer] * (1.0 - density) for layer in dense)
        eps = budget / sum(raw[layer] * numels[layer] for layer in rest)
        largest = max(raw[layer] for layer in rest)
        if eps * largest <= 1.0:
            return [1.0 if layer in dense else eps * raw[layer] for layer in range(len(shapes))]
        dense.update(layer for layer in rest if raw[layer] == largest)
    return [1.0] * len(shapes)


def erk_quotas(shapes: Sequence[Shape], sparsity: float, variant: str = "published") -> list[int]:
    """Return the number of weights that each layer keeps, at least 1.

    `published`: `n_l - int((1 - density_l) * n_l)`, so the sum lies slightly above the budget.
    `paper`: floors, then the weights still missing from `N - floor(sparsity * N)` one each by
    largest fractional part, the earlier layer first on ties.

    >>> erk_quotas([(300, 784), (100, 300), (10, 100)], 0.9)
    [18715, 6906, 1000]
    """
    if variant not in ("published", "paper"):
        raise ValueError(f"erk_quotas: variant must be 'published' or 'paper', got {variant!r}")
    densities = erk_densities(shapes, sparsity)
    numels = [math.prod(shape) for shape in shapes]
    if variant == "published":
        return [max(1, n - int((1.0 - d) * n)) for n, d in zip(numels, densities, strict=True)]
    wanted = [d * n for n, d in zip(numels, densities, strict=True)]
    quotas = [min(n, max(1, math.floor(w))) for n, w in zip(numels, wanted, strict=True)]
    missing = sum(numels) - math.floor(sparsity * sum(numels)) - sum(quotas)
    by_fraction = sorted(
        range(len(shapes)), key=lambda layer: math.floor(wanted[layer]) - wanted[layer]
    )
    while missing > 0:
        for layer in by_fraction:
            if missing > 0 and quotas[layer] < numels[layer]:
                quotas[layer] += 1
                missing -= 1
    return quotas
