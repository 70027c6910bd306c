"""CroP-U and CroPit-U: keep the weights that carry the gradient flow, in either direction.

    S = |w * (H g)|,   g = sum_b dL_b / dW * m,   H g = sum_b H_b g,   in eval mode

CroP-U prunes at once, CroPit-U in seven rounds of sparsities r - (r - 1/2) / 2**i, i = 0..5, and r.
H_b g is the derivative of <g, dL_b / dW>, batch by batch; the product with the weight is taken
inside the selection.

Source: Rachwan et al. 2022 (arXiv:2206.10451), section 4: I = |theta^T H g|, read elementwise.
"""

from __future__ import annotations

from typing import ClassVar

from paikern.scorers.base import Run, register_scorer
from paikern.scorers.gradient_scorer import GradientScorer
from paikern.scorers.grasp import refuse_zeros
from paikern.scores import Product, Scores


@register_scorer("crop")
class CroPU(GradientScorer):
    """`|w * (H g)|` in one round.

    Args:
        batches, batch_size: as in `GradientScorer`; the authors read 5 batches.
        mode: "eval" as published, so that batch norms use their running statistics.

    Attention runs on PyTorch's plain path, the only one with a second derivative. The authors'
    code leaves the first and the last layer dense: `ignore=` does so.

    Raises:
        PaikernError: an operation has no second derivative, or all scores are 0.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> pk.prune(net, "crop", sparsity=0.5, data=(x, torch.arange(8) % 4)).kept
        96
    """

    mode: str = "eval"

    summary = "gradient flow preservation |w * (Hessian @ gradient)|"
    source = "Rachwan et al. 2022, section 4"
    cost = "about 9F"
    weakness = "needs a second derivative; all scores are 0 where the loss has no curvature"
    published_rule = "above_kept"

    def score(self, run: Run) -> Scores:
        network = self.network(run)
        with network.running():
            batches = self.read(run)
            gradients = network.gradients(batches)
            network.mask_(gradients)
            found = network.hessian_product(gradients, batches)
        refuse_zeros(self.name, found)
        return Scores(
            {n: Product(run.weight(n), h, run.masks.get(n)) for n, h in found.items()}, run.shapes
        )


@register_scorer("cropit")
class CroPitU(CroPU):
    """CroP-U in rounds, schedule "halving": half the weights go at once, then half of the rest.

    Options as in `crop`.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> masks = pk.prune(net, "cropit", sparsity=0.98, data=(x, torch.arange(8) % 4))
        >>> [round(1 - row["density"], 2) for row in masks.metadata["history"]]
        [0.5, 0.74, 0.86, 0.92, 0.95, 0.96, 0.98]
    """

    summary = "CroP-U in seven rounds that halve the distance to the sparsity"
    cost = "about 9F a round"
    default_rounds: ClassVar[int] = 7
    default_schedule: ClassVar[str] = "halving"
