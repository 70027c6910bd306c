"""GraSP-It: keep the weights with the largest squared gradient, in rounds.

    S = g**2,   g = mean_b dL_b / dW  at W = w * m;   what is pruned stays pruned

The squared gradients of the kept weights add up to the gradient flow that GraSP preserves; no
second derivative is taken. Squares are made of gradients scaled by a common power of two, because
that of 1e-20 is no float32.

Source: de Jorge et al. 2021 (arXiv:2006.09081), as their published code has it.
"""

from __future__ import annotations

import math

from torch import Tensor

from paikern import ops
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.itersnip import IterativeScorer
from paikern.scores import Dense, Scores


@register_scorer("grasp_it")
class GraSPIt(IterativeScorer):
    """`g**2` of the masked network, round after round; options as in `GradientScorer`.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> pk.prune(net, "grasp_it", sparsity=0.9, data=(x, torch.arange(8) % 4)).kept
        20
    """

    summary = "largest squared gradients in rounds; what is pruned stays pruned"
    source = "de Jorge et al. 2021, published code"
    cost = "3F a round"
    weakness = "weights do not enter the score, large or small"

    def score(self, run: Run) -> Scores:
        found = self.gradients(run, mean=True)
        shift = -_exponent(found)
        entries = {}
        for name, gradient in found.items():
            values = gradient.mul_(2.0**shift).square_()
            if name in run.masks:
                kept = ops.unpack_mask(run.masks[name].to(values.device), values.shape)
                values.masked_fill_(~kept, -1.0)
            entries[name] = Dense(values, exponent=-2 * shift)
        return Scores(entries, run.shapes)


def _exponent(found: dict[str, Tensor]) -> int:
    """Of the largest gradient, within what float32 can be multiplied by."""
    largest = max((float(g.abs().max()) for g in found.values() if g.numel()), default=0.0)
    return max(-120, min(120, math.frexp(largest)[1])) if largest else 0
