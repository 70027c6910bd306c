"""Random pruning: every weight has the same chance, the count is exact.

With `scope="erk"` it is the random ERK baseline of the sparse-training literature (Evci et al.
2020, arXiv:1911.11134, appendix), and the start of DPaI.
"""

from __future__ import annotations

import torch

from paikern.scorers.base import Run, Scorer, register_scorer
from paikern.scores import Dense, Scores


@register_scorer("random")
class Random(Scorer):
    """Score ~ N(0, 1), drawn on the CPU layer by layer from `seed`: the same on any device."""

    summary = "uniformly at random, exact count; scope='erk' for random ERK"
    source = "baseline"
    cost = "one draw a weight"
    weakness = (
        "with scope='global' narrow layers end up as sparse as wide ones; scope='erk' gives "
        "them more"
    )
    reads_weights = False

    def score(self, run: Run) -> Scores:
        return Scores(
            {name: Dense(values) for name, values in normal_scores(run).items()}, run.shapes
        )


def normal_scores(run: Run) -> dict[str, torch.Tensor]:
    """Standard normal float32 scores of every layer, drawn in layer order."""
    generator = run.generator()
    return {
        name: torch.randn(layer.shape, generator=generator, dtype=torch.float32)
        for name, layer in run.layers.items()
    }
