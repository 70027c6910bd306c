"""DPaI as it is commonly run: straight-through top-k masks, autograd and Adam.

One step, for scores s_l with the k_l largest |s_l| kept (M_l), weights replaced by masks, an input
of ones, norms, activations and dropout identity, biases dropped:

    published   every layer divides its input by mx_l = max(input), which stays in the graph;
                J = log(sum(outputs)) + sum_l log mx_l;   q = dJ/dM;   Adam on -a
    paper       J = log(sum(outputs)), the true number of paths;   s += lr * k_l * a
    p = sign(s) q;   e_o, f_oi = node o, kernel (o, i) holds a weight with M = 1 and q != 0
    a = (1-alpha) p + alpha [(1-beta) p (1-e) + beta p (1-f)]

Source: specification of DPaI, sections 1, 3 and 4.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.references.erk import erk_quotas
from bench.references.layers import (
    IDENTITY,
    first_tensor,
    ones_like_input,
    prunable_layers,
    replace_modules,
    run_layer,
)


class DeadNetworkError(ValueError):
    """No path of kept weights leads from the input to the output."""


@dataclass(frozen=True)
class StepStatistics:
    """What one step saw, all of it on the mask before the update.

    `objective` is J; it equals log R_P in variant "paper" and, on chains, in variant "published".
    """

    step: int
    objective: float
    nodes: int
    kernels: int
    weights: int


class _StraightThroughTopK(torch.autograd.Function):
    """Forward: 1.0 for the `keep` largest values, lower index first on ties. Backward: identity."""

    @staticmethod
    def forward(ctx: Any, magnitude: Tensor, keep: int) -> Tensor:
        order = magnitude.flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros_like(magnitude).flatten()
        mask[order[:keep]] = 1.0
        return mask.view_as(magnitude)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class MaskLayer(nn.Module):
    """A Linear or Conv whose weight is the top-`keep` mask of its scores; no bias."""

    mask: Tensor

    def __init__(self, name: str, layer: nn.Module, keep: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.geometry = [layer]  # in a list, so that its parameters are not registered
        self.keep = keep
        self.divide = True
        self.log_maxima: list[Tensor] = []
        weight = cast(Tensor, layer.weight)
        self.scores = nn.Parameter(torch.zeros(weight.shape, dtype=dtype, device=weight.device))
        self.refresh()

    def refresh(self) -> None:
        """Build the mask of the current scores, inside the graph."""
        self.mask = _StraightThroughTopK.apply(self.scores.abs(), self.keep)
        self.mask.retain_grad()
        self.log_maxima = []

    def forward(self, x: Tensor) -> Tensor:
        if self.divide:
            largest = x.max()
            self.log_maxima.append(largest.log())
            x = x / largest
        return run_layer(self.geometry[0], x, self.mask.to(x.dtype))


class DPaIReference:
    """DPaI on a copy of `model`; each `step()` is one published-style training step.

    Args:
        model: any model of Linear and Conv layers joined by norms, activations, pools and adds.
        example: a batch `[batch, features...]` or its shape; the input is one sample of ones.
        sparsity: fraction removed; layer quotas are ERK, rounded as `variant` does.
        variant: "published" or "paper".
        alpha, beta: weights of the node and kernel terms, both in [0, 1].
        lr: .005 for Adam, .1 for plain ascent when None.
        optimizer: "adam" or "ascent"; the variant's own when None.
        dtype: float32 for timing, float64 as an oracle. The paper variant counts paths without
            rescaling, so float32 ends at e**88 of them (an error says so).
        seed: of the N(0, 1) scores, drawn in float32 layer by layer; None: the global generator.

    Ties in |s| keep the lower index. `model` is left untouched and its weights are never read.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor | tuple[int, ...],
        sparsity: float,
        *,
        variant: str = "published",
        alpha: float = 0.99,
        beta: float = 0.5,
        lr: float | None = None,
        optimizer: str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
    ) -> None:
        if variant not in ("published", "paper"):
            raise ValueError(f"variant must be 'published' or 'paper', got {variant!r}")
        if not (0.0 <= alpha <= 1.0 and 0.0 <= beta <= 1.0):
            raise ValueError(f"alpha and beta must be in [0, 1], got {alpha} and {beta}")
        optimizer = optimizer or ("adam" if variant == "published" else "ascent")
        if optimizer not in ("adam", "ascent"):
            raise ValueError(f"optimizer must be 'adam' or 'ascent', got {optimizer!r}")
        self.variant, self.alpha, self.beta = variant, alpha, beta
        self.lr = lr if lr is not None else (0.005 if optimizer == "adam" else 0.1)
        self.steps_done = 0
        self.ones = ones_like_input(example, dtype)  # [1, *features]

        work = copy.deepcopy(model).to(dtype).eval()
        layers = prunable_layers(work)
        shapes = [tuple(cast(Tensor, layer.weight).shape) for layer in layers.values()]
        quotas = erk_quotas(shapes, sparsity, variant)
        masked = {
            id(layer): MaskLayer(name, layer, keep, dtype)
            for (name, layer), keep in zip(layers.items(), quotas, strict=True)
        }

        def replacement(module: nn.Module) -> nn.Module | None:
            if id(module) in masked:
                return masked[id(module)]
            return nn.Identity() if isinstance(module, IDENTITY) else None

        self.network = replace_modules(work, replacement)
        self.layers = list(masked.values())
        for layer in self.layers:
            layer.divide = variant == "published"
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.set_scores(
            {
                layer.name: torch.randn(layer.scores.shape, generator=generator)
                for layer in self.layers
            }
        )
        self.adam = (
            torch.optim.Adam([layer.scores for layer in self.layers], lr=self.lr)
            if optimizer == "adam"
            else None
        )

    def set_scores(self, scores: dict[str, Tensor]) -> None:
        """Start from the given scores (name -> tensor of the weight's shape), all layers."""
        names = [layer.name for layer in self.layers]
        if sorted(scores) != sorted(names):
            raise ValueError(f"set_scores: names must be {names}, got {list(scores)}")
        with torch.no_grad():
            for layer in self.layers:
                layer.scores.copy_(scores[layer.name])
        self._refresh()

    def scores(self) -> dict[str, Tensor]:
        """Return a copy of the scores by parameter name."""
        return {layer.name: layer.scores.detach().clone() for layer in self.layers}

    def masks(self) -> dict[str, Tensor]:
        """Return the bool masks of the current scores; layer l keeps exactly its quota."""
        self._refresh()
        return {layer.name: layer.mask.detach().bool() for layer in self.layers}

    def log_paths(self) -> float:
        """Return the logarithm of the true number of effective paths, counted in float64."""
        self._refresh()
        divide = [layer.divide for layer in self.layers]
        with torch.no_grad():
            for layer in self.layers:
                layer.divide = False
            total = first_tensor(self.network(self.ones.double())).sum().item()
        for layer, flag in zip(self.layers, divide, strict=True):
            layer.divide = flag
        return math.log(total) if total > 0.0 else -math.inf

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Return J and q = dJ/dM by parameter name, for the current scores, without an update."""
        objective = self._backward()
        return objective, {layer.name: self._mask_gradient(layer).clone() for layer in self.layers}

    def step(self) -> StepStatistics:
        """Do one step: forward, backward, flags, update. Statistics are of the mask before it."""
        objective = self._backward()
        nodes = kernels = weights = 0
        for layer in self.layers:
            mask, q = layer.mask.detach(), self._mask_gradient(layer)  # [O, I, *kernel]
            active = (q * mask).abs()
            per_kernel = active if active.dim() == 2 else active.flatten(2).sum(2)  # [O, I]
            kernel = per_kernel > 0  # f
            node = kernel.any(dim=1)  # e, [O]
            spread = (-1,) + (1,) * (active.dim() - 1)
            dead_node = (~node).to(q.dtype).view(spread)
            dead_kernel = (~kernel).to(q.dtype).view(*kernel.shape, *spread[2:])
            p = cast(Tensor, layer.scores.grad)  # autograd went through abs: sign(s) * q
            ascent = (1.0 - self.alpha) * p + self.alpha * (
                (1.0 - self.beta) * p * dead_node + self.beta * p * dead_kernel
            )
            layer.scores.grad = -ascent
            nodes += int(node.sum())
            kernels += int(kernel.sum())
            weights += int((active > 0).sum())
        if self.adam is not None:
            self.adam.step()
        else:
            with torch.no_grad():
                for layer in self.layers:
                    assert layer.scores.grad is not None
                    layer.scores.sub_(layer.scores.grad, alpha=self.lr * layer.keep)
        self.steps_done += 1
        for layer in self.layers:
            if layer.scores.isnan().any():
                raise ValueError(f"step {self.steps_done}: NaN in the scores of {layer.name}")
        return StepStatistics(self.steps_done, objective, nodes, kernels, weights)

    def _refresh(self) -> None:
        for layer in self.layers:
            layer.refresh()

    def _backward(self) -> float:
        self._refresh()
        for layer in self.layers:
            layer.scores.grad = None
        total = first_tensor(self.network(self.ones)).sum()
        objective = total.log()
        for layer in self.layers:
            for log_max in layer.log_maxima:
                objective = objective + log_max
        value = objective.item()
        if not math.isfinite(value):
            if value == math.inf:
                raise OverflowError(
                    f"path count exceeds {self.ones.dtype}: use dtype=torch.float64"
                )
            raise DeadNetworkError(f"dead network: no output of {self._first_dead()} is live")
        objective.backward()
        return value

    @staticmethod
    def _mask_gradient(layer: MaskLayer) -> Tensor:
        gradient = layer.mask.grad  # None: the layer does not reach the output
        return torch.zeros_like(layer.scores) if gradient is None else gradient

    def _first_dead(self) -> str:
        """Name the first layer, in call order, whose output is zero or NaN everywhere."""
        dead: list[str] = []

        def look(layer: nn.Module, _: object, output: Tensor) -> None:
            if not bool((output > 0).any()):
                dead.append(cast(MaskLayer, layer).name)

        hooks = [layer.register_forward_hook(look) for layer in self.layers]
        with torch.no_grad():
            self.network(self.ones)
        for hook in hooks:
            hook.remove()
        return dead[0] if dead else "the last layer"
