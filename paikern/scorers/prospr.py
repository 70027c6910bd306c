"""ProsPr: keep the weights that matter for the loss after the first steps of training.

    w_0 = m * w,   w_{t+1} = w_t - lr * b_t,   b_t = momentum * b_{t-1} + dL_t / dw_t
    S = |dL_M(w_M) / dm| = |w * dL_M(w_M) / dw_0|   at m = 1

The derivative goes back through the steps one at a time, from what each step started with:

    u_t = momentum * u_{t+1} - lr * v_{t+1},   v_t = v_{t+1} + H_t u_t,   v_M = dL_M / dw_M

so that the graph of one batch is alive at a time instead of those of all M + 1: the same numbers as
differentiating the unrolled training, for one more forward and backward pass a step.

Source: ProsPr, Alizadeh et al. 2022 (arXiv:2202.08132), section 3.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from paikern import ops
from paikern.batches import Batch
from paikern.errors import NonFiniteScoreError
from paikern.gradients import Network, own_randomness, untouched
from paikern.gradients.holding import holding
from paikern.gradients.network import NonFiniteLossError, twice_differentiable
from paikern.gradients.refusals import (
    named_derivatives,
    refuse_non_finite,
    refuse_once_differentiable,
)
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.gradient_scorer import GradientScorer
from paikern.scores import Product, Scores

Tensors = dict[str, Tensor]


@register_scorer("prospr")
class ProsPr(GradientScorer):
    """`|w * dL_M / dw_0|` through M steps of SGD from the given weights.

    Args:
        steps: M, before the loss that is differentiated.
        lr, momentum: of the steps, which move every parameter that is not frozen, biases and norms
            included. Pruned weights of earlier rounds stay 0.
        order: "full", or "first" to leave the second derivatives out: then it is the SNIP score
            with the gradient after M steps, and one backward pass a step.
        batches: different batches to read, used in turn; None for `steps + 1`, a new one each time.
        mode, batch_size: as in `GradientScorer`.

    In the "published" variant the momentum buffer of the first step carries no derivative, as in
    the authors' code; without momentum both are the same.

    Raises:
        NonFiniteScoreError: `lr` is so large that the steps end in NaN or infinity.

    Example:
        >>> import torch, paikern as pk
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = layer.weight.data.fill_(3.0)
        >>> half = lambda y, t: (y - t).square().mean() / 2  # w_1 = (1 - lr) m w
        >>> data = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> options = dict(data=data, loss_fn=half, steps=1, batches=1, lr=0.5)
        >>> pk.score(layer, "prospr", **options).dense("weight")  # (1 - lr)**2 w**2
        tensor([[2.2500]])
    """

    steps: int = 3
    lr: float = 0.1
    momentum: float = 0.0
    order: str = "full"

    summary = "sensitivity of the loss after M steps of SGD, differentiated through the steps"
    source = "Alizadeh et al. 2022, section 3"
    cost = "(12 steps + 3) F of one batch"
    weakness = "empties 7 layers of a ResNet-20 at 98 %; needs a second derivative and a small lr"
    variants: ClassVar[tuple[str, ...]] = ("paper", "published")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}; without steps it is 'snip'")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be above 0 and finite, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.order not in ("full", "first"):
            raise ValueError(f"order must be 'full' or 'first', got {self.order!r}")

    def score(self, run: Run) -> Scores:
        found = self.through_steps(run, self.network(run))
        self.note_zeros(run, found)
        return Scores(
            {n: Product(run.weight(n), found[n], run.masks.get(n)) for n in run.layers}, run.shapes
        )

    def through_steps(self, run: Run, network: Network) -> Tensors:
        """`dL_M / dw_0` of everything in `network.weights`, on the batches of this round."""
        with own_randomness(run.model, run.seed):
            read = self.read(run, self.batches or self.steps + 1, added=False)
        batches = [read[t % len(read)] for t in range(self.steps + 1)]
        return self._derivative(network, batches, run.variant == "published")

    def _derivative(self, network: Network, batches: Sequence[Batch], detached: bool) -> Tensors:
        """`dL_M / dw_0` of every parameter; with `detached` b_0 counts as a constant."""
        path = [_start(network)]  # w_0 ... w_M
        fixed = _frozen(network)
        buffer: Tensors = {}
        for t in range(self.steps):
            slopes = self._gradient(network, batches[t], t, path)
            for name, slope in slopes.items():
                if name in fixed:
                    continue
                buffer[name] = slope + self.momentum * buffer[name] if name in buffer else slope
            path.append(_moved(network.run, path[t], buffer, self.lr))
        v = self._gradient(network, batches[-1], self.steps, path)
        path.pop()
        network.complete({n: g for n, g in v.items() if n in network.weights})
        u: Tensors = {}
        last = 1 if detached and self.momentum else 0
        for t in reversed(range(last if self.order == "full" else self.steps, self.steps)):
            for name, slope in v.items():
                if name in fixed:
                    continue
                held = _held(network.run, name, slope) * -self.lr
                u[name] = held + self.momentum * u[name] if name in u else held
            for name, bend in _product(network, batches[t], t, path.pop(), u).items():
                v[name] = v[name] + bend if name in v else bend
        self._refuse_non_finite(v, "the derivative through the steps by", self.steps)
        return {
            name: v.get(name, torch.zeros_like(leaf, requires_grad=False))
            for name, leaf in network.weights.items()
        }

    def _gradient(
        self, network: Network, batch: Batch, step: int, path: Sequence[Tensors]
    ) -> Tensors:
        """`dL_t / dw_t` at the end of `path`, without what the loss does not depend on.

        Raises:
            NonFiniteScoreError: it is `lr` that makes the loss or the gradient NaN or infinite.
            ValueError: the loss does so at w_0 too, or depends on none of the weights.
        """
        weights = path[-1]
        with _at(network, step, weights) as leaves:
            try:
                loss = network.loss(batch, step)
            except NonFiniteLossError as error:
                if step and _is_finite(network, batch, step, path[0]):
                    what = f"the loss of batch {step} is {error.value}"
                    raise self._diverged(what, step) from None
                raise
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
        found = {n: g for n, g in zip(weights, slopes, strict=True) if g is not None}
        if not found.keys() & network.weights.keys():
            raise network.independent(step)
        self._refuse_non_finite(found, "the gradient of", step)
        return found

    def _refuse_non_finite(self, found: Tensors, what: str, step: int) -> None:
        for name, slope in found.items():
            if slope.numel() and not bool(torch.isfinite(slope.sum())):
                if step == 0:
                    refuse_non_finite(name, slope)
                elif not bool(torch.isfinite(slope).all()):  # or only the sum is too large
                    raise self._diverged(f"{what} {name} is NaN or infinite", step)

    def _diverged(self, what: str, step: int) -> NonFiniteScoreError:
        return NonFiniteScoreError(
            f"lr={self.lr}: {what} after step {step} of {self.steps} in method "
            f"{self.name!r}; use a smaller lr="
        )


def _start(network: Network) -> Tensors:
    """Everything that a step moves: the weights of the layers and all other parameters."""
    run = network.run
    sources = {layer.source for layer in run.layers.values()}
    found = dict(network.weights)
    for name, parameter in run.model.named_parameters():
        if name not in sources and parameter.requires_grad:
            found[name] = parameter.detach().requires_grad_()
    return found


def _frozen(network: Network) -> set[str]:
    """What is differentiated though no step moves it: frozen biases, of the channels' gates."""
    parameters = dict(network.run.model.named_parameters())
    others = network.weights.keys() - network.run.layers.keys()
    return {name for name in others if not parameters[name].requires_grad}


@contextlib.contextmanager
def _at(network: Network, step: int, weights: Tensors) -> Iterator[list[Tensor]]:
    """The model at a step. Dropout drops the same values whenever the step is run again."""
    run = network.run
    named = {run.layers[n].source if n in run.layers else n: w for n, w in weights.items()}
    with (
        untouched(run.model, network.mode, run.seed + step),
        holding(run.model, named),
        torch.enable_grad(),
        named_derivatives(f" of batch {step} in method {run.method!r}"),
    ):
        yield list(weights.values())


def _is_finite(network: Network, batch: Batch, step: int, weights: Tensors) -> bool:
    """Whether the loss of a batch is a finite number with these weights."""
    with _at(network, step, weights):
        try:
            network.loss(batch, step)
        except NonFiniteLossError:
            return False
    return True


def _product(
    network: Network, batch: Batch, step: int, weights: Tensors, vectors: Tensors
) -> Tensors:
    """`H u` of one batch."""
    with _at(network, step, weights) as leaves, twice_differentiable(network.run.model):
        loss = network.loss(batch, step)
        first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        z = sum(
            (vectors[name] * slope).sum()
            for name, slope in zip(weights, first, strict=True)
            if slope is not None and slope.requires_grad and name in vectors
        )
        del first
        if not isinstance(z, Tensor):
            return {}
        refuse_once_differentiable(z)
        second = torch.autograd.grad(z, leaves, allow_unused=True)
    return {n: h for n, h in zip(weights, second, strict=True) if h is not None}


def _moved(run: Run, weights: Tensors, buffer: Tensors, lr: float) -> Tensors:
    with torch.no_grad():
        moved = {
            name: w - lr * _held(run, name, buffer[name]) if name in buffer else w.detach()
            for name, w in weights.items()
        }
    return {name: w.requires_grad_() for name, w in moved.items()}


def _held(run: Run, name: str, values: Tensor) -> Tensor:
    """0 where an earlier round has pruned."""
    packed = run.masks.get(name)
    if packed is None:
        return values
    return values * ops.unpack_mask(packed.to(values.device), tuple(values.shape))
