"""Hessian products from two gradients, where an operation has no second derivative."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paikern.batches import Batch
from paikern.gradients.network import Network, weighted

# Relative to |W|. A step over the kink of one ReLU adds a jump of the gradient divided by the step:
# on a small convolutional net steps of 1e-3, 1e-4, 1e-5 and 1e-7 were off by 6.6, 8.4, 84 and 1e-7.
STEP = 1e-7


def difference_product(
    network: Network,
    vectors: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """`scale * sum_b [dL_b/dW (W + h v) - dL_b/dW (W - h v)] / 2h`, all in float64.

    h = 1e-7 |W| / |v| over all weights together: small enough to cross hardly any kink of a ReLU,
    large enough for rounding in float64 (1e-9 relative). Parameters, buffers and inputs enter as
    float64 copies; the model must not fix another dtype inside.

    Args:
        network: within `network.running()`.
        vectors: v, one tensor a weight; all 0 gives 0.
        batches: as in `Network.hessian_product`.
        scale: a factor of the result.
    """
    layers, model = network.run.layers, network.run.model
    sources = {layer.source for layer in layers.values()}
    others: dict[str, Tensor] = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name not in sources
    }
    directions = {name: vectors[name].double() for name in layers}
    length = _norm(directions)
    if length == 0:
        return {name: torch.zeros_like(v) for name, v in vectors.items()}
    h = STEP * _norm({name: w.detach().double() for name, w in network.weights.items()}) / length
    total = {name: torch.zeros_like(d) for name, d in directions.items()}
    for sign in (1.0, -1.0):
        moved = {
            name: torch.add(leaf.detach().double(), directions[name], alpha=sign * h)
            for name, leaf in network.weights.items()
        }
        leaves = [leaf.requires_grad_() for leaf in moved.values()]
        for number, (batch, share) in enumerate(weighted(batches)):
            value = network.loss(_double(batch), number, {**others, **moved})
            slopes = torch.autograd.grad(value, leaves, allow_unused=True)
            for added, slope in zip(total.values(), slopes, strict=True):
                if slope is not None:
                    added.add_(slope, alpha=sign * share * scale / (2 * h))
    return {name: value.to(vectors[name].dtype) for name, value in total.items()}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(math.fsum(float(t.square().sum()) for t in tensors.values()))


def _double(batch: Batch) -> Batch:
    return Batch(_wide(batch.inputs), _wide(batch.targets))


def _wide(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _wide(item) for key, item in value.items()}
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value
