"""Every path of a tiny MLP, one by one, in exact rational arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class BruteForce:
    """Sum over paths of the product of their weights, the same sum over the paths through each
    weight `[layer][o][i]`, and what lies on at least one path."""

    total: Fraction
    through: list[list[list[Fraction]]]
    nodes: int
    weights: int


def paths(layers: Sequence[Matrix]) -> Iterator[tuple[tuple[int, ...], Fraction]]:
    """Yield (units, product) for every path with a nonzero product; rows of a matrix are outputs.

    >>> [units for units, _ in paths([[[1, 0]], [[1], [1]]])]
    [(0, 0, 0), (0, 0, 1)]
    """
    widths = [len(layers[0][0]), *(len(layer) for layer in layers)]
    for units in itertools.product(*map(range, widths)):
        product = Fraction(1)
        for layer, (source, target) in zip(layers, itertools.pairwise(units), strict=True):
            product *= Fraction(layer[target][source])
        if product:
            yield units, product


def brute_force(layers: Sequence[Matrix]) -> BruteForce:
    """Enumerate the paths of an MLP given as `[O][I]` matrices (up to 4 layers of 4 units)."""
    total = Fraction(0)
    through = [[[Fraction(0)] * len(row) for row in layer] for layer in layers]
    nodes: set[tuple[int, int]] = set()
    weights: set[tuple[int, int, int]] = set()
    for units, product in paths(layers):
        total += product
        for depth, (source, target) in enumerate(itertools.pairwise(units)):
            through[depth][target][source] += product
            nodes.add((depth, target))
            weights.add((depth, target, source))
    return BruteForce(total, through, len(nodes), len(weights))
