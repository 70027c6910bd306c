"""SNIP and GraSP as they are commonly run: a copy of the model, autograd, one global selection.

SNIP    every layer computes with weight * mask, mask a float parameter of ones;
        S = |dL/dmask| / sum |dL/dmask|
GraSP   g = dL/dW over all batches, then H g by differentiating <g, dL_b/dW> batch by batch, with
        L = CE(f / temperature);   S = w * (H g) / |sum w * (H g)|

Both models run in train mode. Source: specification of the gradient family, sections 1 and 3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.references.layers import PRUNABLE, prunable_layers, replace_modules, run_layer
from bench.references.selection import Masks, removal_count, select_global

Batches = Sequence[tuple[Tensor, Tensor]]


class _Masked(nn.Module):
    """A Linear or Conv whose weight is multiplied by a mask that gradients are taken of."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast("nn.Parameter | None", layer.bias)
        self.mask = nn.Parameter(torch.ones_like(self.weight))
        self.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return run_layer(self.layer, x, self.weight * self.mask, self.bias)


def snip(model: nn.Module, batches: Batches, sparsity: float, *, selection: str = "exact") -> Masks:
    """Return name -> bool mask of `model`, which is left untouched.

    `batches` are pairs of inputs and class numbers; gradients add up over them. `selection` is
    "exact" (a stable sort of all scores) or "published" (the threshold by `torch.kthvalue`).
    """
    names = list(prunable_layers(model))
    work = copy.deepcopy(model).train()
    work = replace_modules(work, lambda m: _Masked(m) if isinstance(m, PRUNABLE) else None)
    layers = [m for m in work.modules() if isinstance(m, _Masked)]
    for x, y in batches:
        F.cross_entropy(work(x), y).backward()
    slopes = [cast(Tensor, layer.mask.grad).abs() for layer in layers]
    norm = torch.cat([s.flatten() for s in slopes]).sum()
    scores = {name: slope / norm for name, slope in zip(names, slopes, strict=True)}
    total = sum(s.numel() for s in slopes)
    return select_global(scores, removal_count(total, sparsity), selection)


def grasp(
    model: nn.Module,
    batches: Batches,
    sparsity: float,
    *,
    temperature: float = 200.0,
    selection: str = "exact",
) -> Masks:
    """As `snip`; the largest S are kept."""
    names = list(prunable_layers(model))
    work = copy.deepcopy(model).train()
    weights = [cast(nn.Parameter, layer.weight) for layer in prunable_layers(work).values()]
    slopes: list[Tensor] | None = None
    for x, y in batches:
        loss = F.cross_entropy(work(x) / temperature, y)
        found = torch.autograd.grad(loss, weights)
        slopes = (
            list(found) if slopes is None else [a + b for a, b in zip(slopes, found, strict=True)]
        )
    assert slopes is not None
    for x, y in batches:
        loss = F.cross_entropy(work(x) / temperature, y)
        found = torch.autograd.grad(loss, weights, create_graph=True)
        z = sum((a.detach() * b).sum() for a, b in zip(slopes, found, strict=True))
        cast(Tensor, z).backward()
    products = [w.detach() * cast(Tensor, w.grad) for w in weights]
    norm = torch.cat([p.flatten() for p in products]).sum().abs() + 1e-10
    scores = {name: p / norm for name, p in zip(names, products, strict=True)}
    total = sum(p.numel() for p in products)
    return select_global(scores, removal_count(total, sparsity), selection)
