"""ProsPr in float64: training unrolled in one graph, differentiated by explicit masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Tensors = dict[str, Tensor]


def _loss(model: nn.Module, weights: Tensors, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        return functional_call(model, weights, (), dict(batch)).loss
    return F.cross_entropy(functional_call(model, weights, (batch[0].double(),)), batch[1])


def prospr_scores(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    order: str = "full",
    detach_first_buffer: bool = False,
    masks: Mapping[str, Tensor] | None = None,
) -> Tensors:
    """`|dL_M / dc|` at c = `masks` after a step on every batch but the last, which L_M is of."""
    work = copy.deepcopy(model).double().train()
    if hasattr(work, "set_attn_implementation"):
        work.set_attn_implementation("eager")
    parameters = {n: p.detach() for n, p in work.named_parameters()}
    kept = {
        n: torch.ones_like(parameters[n]) if masks is None else masks[n].double() for n in names
    }
    gates = {n: mask.clone().requires_grad_() for n, mask in kept.items()}
    weights = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    weights |= {n: gates[n] * parameters[n] for n in names}
    buffer: Tensors = {}
    for number, batch in enumerate(batches[:-1]):
        slopes = torch.autograd.grad(
            _loss(work, weights, batch), list(weights.values()), create_graph=True,
            allow_unused=True,
        )  # fmt: skip
        for (name, weight), slope in zip(list(weights.items()), slopes, strict=True):
            if slope is None:
                continue
            slope = slope.detach() if order == "first" else slope
            slope = momentum * buffer[name] + slope if name in buffer else slope
            buffer[name] = slope.detach() if detach_first_buffer and number == 0 else slope
            step = slope if name not in kept else kept[name] * slope
            # With the buffer of the first step detached, its own update is detached as well.
            step = step.detach() if detach_first_buffer and number == 0 else step
            weights[name] = weight - lr * step
    found = torch.autograd.grad(
        _loss(work, weights, batches[-1]), list(gates.values()), allow_unused=True
    )
    return {
        n: torch.zeros_like(kept[n]) if g is None else g.abs()
        for n, g in zip(gates, found, strict=True)
    }


def prospr_channel_scores(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Any],
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    order: str = "full",
    mode: str = "train",
) -> Tensors:
    """`|dL_M / dc|` of the named layers; c multiplies each output's weights and bias at the start.

    One graph from c through all steps. Frozen parameters do not move.
    """
    work = copy.deepcopy(model).double().train(mode == "train")
    moving = {n for n, p in work.named_parameters() if p.requires_grad}
    weights = {n: p.detach().clone().requires_grad_() for n, p in work.named_parameters()}
    gates = {}
    for name in layers:
        layer = work.get_submodule(name)
        transposed = isinstance(layer, nn.ConvTranspose2d)
        gates[name] = torch.ones(
            layer.weight.shape[1 if transposed else 0], dtype=torch.float64, requires_grad=True
        )
        view = [1] * layer.weight.dim()
        view[1 if transposed else 0] = -1
        weights[f"{name}.weight"] = gates[name].view(view) * layer.weight.detach()
        if layer.bias is not None:
            weights[f"{name}.bias"] = gates[name] * layer.bias.detach()
    buffer: Tensors = {}
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches[:-1]:
            inside = [n for n in weights if n in moving]
            slopes = torch.autograd.grad(
                _loss(work, weights, batch), [weights[n] for n in inside], create_graph=True
            )
            for name, slope in zip(inside, slopes, strict=True):
                kept = slope.detach() if order == "first" else slope
                buffer[name] = kept + momentum * buffer[name] if name in buffer else kept
                weights[name] = weights[name] - lr * buffer[name]
        found = torch.autograd.grad(_loss(work, weights, batches[-1]), list(gates.values()))
    return {n: g.abs() for n, g in zip(gates, found, strict=True)}
