"""Magnitude pruning: keep the largest |w|.

Source: LeCun et al. 1990 as the field uses it; Han et al. 2015 (arXiv:1506.02626), section 3. At
initialisation it keeps the layers with the widest distribution, which is why it is a baseline.
"""

from __future__ import annotations

from paikern.scorers.base import Run, Scorer, register_scorer
from paikern.scores import Dense, Scores


@register_scorer("magnitude")
class Magnitude(Scorer):
    """Score = |w|, in one round; the weights themselves are ranked, no copy is made."""

    summary = "largest |w|; no data, no inputs"
    source = "Han et al. 2015"
    cost = "one read of the weights"
    weakness = (
        "untrained, layers are ranked by their spread; an eighth-width VGG-16 keeps no path at 98 %"
    )

    def score(self, run: Run) -> Scores:
        entries = {name: Dense(run.weight(name), absolute=True) for name in run.layers}
        return Scores(entries, run.shapes)
