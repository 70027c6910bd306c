"""IterSNIP: SNIP a little at a time, the gradient taken of what is left.

    S = |w * g|,   g = mean_b dL_b / dW  at W = w * m;   what is pruned stays pruned

Early rounds remove what the dense network does not need, so that far fewer layers are emptied at
high sparsity than by one SNIP round.

Source: de Jorge et al. 2021 (arXiv:2006.09081), section 4 (Iter SNIP).
"""

from __future__ import annotations

from typing import ClassVar

from paikern.scorers.base import Run, register_scorer
from paikern.scorers.gradient_scorer import GradientScorer
from paikern.scores import Product, Scores


class IterativeScorer(GradientScorer):
    """What the iterative methods of de Jorge et al. share: rounds, loss and selection rule.

    Variant "published" differentiates the mean of -logit of the label where no `loss_fn` is given,
    as the authors' code does (it passes logits to a loss that expects log-probabilities).
    """

    default_rounds: ClassVar[int] = 10
    variants: ClassVar[tuple[str, ...]] = ("paper", "published")
    published_rule: ClassVar[str] = "at_least_kept"

    def default_loss(self, run: Run) -> str | None:
        return "nll_logits" if run.variant == "published" else None


@register_scorer("itersnip")
class IterSNIP(IterativeScorer):
    """`|w * g|` of the masked network, round after round; options as in `GradientScorer`.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> masks = pk.prune(net, "itersnip", sparsity=0.9, data=(x, torch.arange(8) % 4))
        >>> masks.kept, len(masks.metadata["history"])
        (20, 10)
    """

    summary = "SNIP in rounds; what is pruned stays pruned"
    source = "de Jorge et al. 2021, section 4"
    cost = "3F a round"
    weakness = "early losses are final; an eighth-width VGG-16 trains to 37 % at 99 %"

    def score(self, run: Run) -> Scores:
        found = self.gradients(run, mean=True)
        return Scores(
            {n: Product(run.weight(n), g, run.masks.get(n)) for n, g in found.items()}, run.shapes
        )
