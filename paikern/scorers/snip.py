"""SNIP: keep the weights that the loss is most sensitive to.

    S = |sum_b dL_b / dm| = |w * sum_b dL_b / dw|   at m = 1

The gradient is one backward pass a batch, added in place; the product with the weight is taken
inside the selection, so that no score tensor is made.

Source: SNIP, Lee et al. 2019 (arXiv:1810.02340), equations 5 and 6. Their normalisation by the sum
of all scores does not change the order.
"""

from __future__ import annotations

from paikern.scorers.base import Run, register_scorer
from paikern.scorers.gradient_scorer import GradientScorer
from paikern.scores import Product, Scores


@register_scorer("snip")
class SNIP(GradientScorer):
    """`|w * sum_b g_b|` of the loss, in one round; options as in `GradientScorer`.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> pk.prune(net, "snip", sparsity=0.5, data=(x, torch.arange(8) % 4)).kept
        96
    """

    summary = "connection sensitivity |w * gradient| of the loss on data"
    source = "Lee et al. 2019, eqs. 5-6"
    cost = "3F"
    weakness = (
        "empties 5 layers of a ResNet-20 at 99 %, and leaves no path on an eighth-width VGG-16"
    )
    published_rule = "at_least_kept"

    def score(self, run: Run) -> Scores:
        found = self.gradients(run)
        return Scores(
            {n: Product(run.weight(n), g, run.masks.get(n)) for n, g in found.items()}, run.shapes
        )
