"""GraSP: keep the weights whose removal would shrink the gradient flow.

    S = w * (H g),   g = sum_b dL_b / dW,   H g = sum_b H_b g,   L = CE(f / temperature)

S is signed, the largest are kept: removing a weight changes the squared norm of the gradient by
about -2 S. H_b g is the derivative of <g, dL_b / dW>, batch by batch; no Hessian and no second
model is made. g shrinks with the temperature and S with its third power, so the loss is multiplied
by a power of two below both derivatives, which the scores carry as their exponent.

Source: GraSP, Wang et al. 2020 (arXiv:2002.07376), equation 8 and algorithm 2, where the lowest
-S are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import ops
from paikern.batches import Batch
from paikern.errors import PaikernError
from paikern.gradients import Network
from paikern.gradients.differences import difference_product
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.gradient_scorer import GradientScorer
from paikern.scores import Dense, Scores


@register_scorer("grasp")
class GraSP(GradientScorer):
    """`w * (H g)`, signed, in one round.

    Args:
        batches, mode, batch_size: as in `GradientScorer`.
        temperature: the outputs are divided by it before the loss.
        reinit_linear: score Linear layers with weights drawn anew (Xavier normal, from the seed),
            as the authors' code does; None does so in variant "published" only.
        finite_difference: H g from two gradients in float64, a step h = 1e-7 |w| / |g| to either
            side, instead of a second derivative: for operations that have none. An approximation,
            as good as float32 unless a ReLU opens or shuts within the step.

    Attention runs on PyTorch's plain path, the only one with a second derivative.

    Raises:
        PaikernError: an operation has no second derivative, or all scores are 0.

    Example:
        >>> import torch, paikern as pk
        >>> net, x = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0), torch.eye(8)
        >>> pk.prune(net, "grasp", sparsity=0.5, data=(x, torch.arange(8) % 4)).kept
        96
    """

    temperature: float = 200.0
    reinit_linear: bool | None = None
    finite_difference: bool = False

    summary = "preserves the gradient flow: w * (Hessian @ gradient), signed"
    source = "Wang et al. 2020, eq. 8"
    cost = "about 9F"
    weakness = "needs a second derivative; all scores are 0 where the loss has no curvature"
    variants = ("paper", "published")
    published_rule = "at_least_removed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    def score(self, run: Run) -> Scores:
        network = self.network(run, self.temperature)
        published = run.variant == "published"
        if published if self.reinit_linear is None else self.reinit_linear:
            _draw_linear(run, network)
        power = max(0, min(30, math.frexp(self.temperature)[1] - 1))
        with network.running():
            batches = self.read(run)
            gradients = network.gradients(batches, scale=2.0**power)
            network.mask_(gradients)
            found = self._product(network, gradients, batches, 2.0 ** (2 * power))
        refuse_zeros(self.name, found)
        entries = {}
        for name, product in found.items():
            values = product.mul_(network.weights[name].detach())
            if name in run.masks:
                kept = ops.unpack_mask(run.masks[name].to(values.device), values.shape)
                values.masked_fill_(~kept, -torch.inf)
            entries[name] = Dense(values, exponent=-3 * power)
        return Scores(entries, run.shapes)

    def _product(
        self,
        network: Network,
        gradients: dict[str, Tensor],
        batches: Sequence[Batch],
        scale: float,
    ) -> dict[str, Tensor]:
        if self.finite_difference:
            return difference_product(network, gradients, batches, scale=scale)
        return network.hessian_product(gradients, batches, scale=scale)


def refuse_zeros(method: str, product: dict[str, Tensor]) -> None:
    """Raise PaikernError where H g is 0 everywhere, so that nothing tells the weights apart."""
    if not any(bool(h.any()) for h in product.values()):
        raise PaikernError(
            f"{method}: the Hessian times the gradient is 0 for every weight, so all scores are 0: "
            "the loss has no curvature here (saturated, or linear in the outputs); use another "
            "temperature= or loss_fn=, or method 'snip'"
        )


def _draw_linear(run: Run, network: Network) -> None:
    """Xavier normal in place of the values of Linear layers, for this scoring only."""
    generator = run.generator()
    for name, layer in run.layers.items():
        if layer.kind == "linear":
            leaf = network.weights[name]
            values = torch.randn(leaf.shape, generator=generator, dtype=torch.float32)
            values *= math.sqrt(2.0 / sum(leaf.shape))
            drawn = values.to(leaf.device, leaf.dtype)
            if name in run.masks:
                ops.apply_mask_(drawn, run.masks[name].to(leaf.device))
            network.weights[name] = drawn.requires_grad_()
