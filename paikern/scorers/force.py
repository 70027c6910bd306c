"""FORCE: foresight connection sensitivity, in rounds that may bring weights back.

    S = |w * g|,   g = mean_b dL_b / dW  at W = w * m,   w the dense weights

The network is sparse, but every weight is scored as if it were there: dL/dW is taken at the places
of pruned weights too, so that one pruned by mistake can return.

Source: de Jorge et al. 2021 (arXiv:2006.09081), equation 6 and algorithm 1.
"""

from __future__ import annotations

from paikern.scorers.base import Run, register_scorer
from paikern.scorers.itersnip import IterativeScorer
from paikern.scores import Product, Scores


@register_scorer("force")
class FORCE(IterativeScorer):
    """`|w * g|` of all weights, g that of the sparse network; options as in `GradientScorer`.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> pk.prune(net, "force", sparsity=0.9, data=(x, torch.arange(8) % 4)).kept
        20
    """

    summary = "SNIP of the sparse network in rounds; pruned weights may return"
    source = "de Jorge et al. 2021, eq. 6"
    cost = "3F a round"
    weakness = "empties 2 layers of a ResNet-20 at 98 %, 19 at 99 %, in 10 rounds"

    def score(self, run: Run) -> Scores:
        found = self.gradients(run, mean=True)
        return Scores({n: Product(run.weight(n), g) for n, g in found.items()}, run.shapes)
