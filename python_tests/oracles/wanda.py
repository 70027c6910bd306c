"""Wanda in float64: inputs caught by module hooks, convolutions unfolded, rows sorted alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = dict[str, Tensor]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D")
        and id(module.weight) not in tied
    }


def _energy(module: nn.Module, x: Tensor) -> Tensor:
    """Sums of squares in the shape of the weight."""
    weight = module.weight
    if type(module).__name__ == "Conv1D":
        return x.reshape(-1, x.shape[-1]).square().sum(0)[:, None].expand(weight.shape)
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).square().sum(0).expand(weight.shape)
    columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    per_input = columns.square().sum((0, 2)).view(x.shape[1], *module.kernel_size)
    parts = per_input.chunk(module.groups)
    rows = weight.shape[0] // module.groups
    return torch.cat([part.expand(rows, *part.shape) for part in parts])


def wanda_scores(model: nn.Module, data: Any, masks: Mapping[str, Tensor] | None = None) -> Tensors:
    """`|w| * ||x||` of every Linear, Conv2d and Conv1D that no embedding shares its weight with."""
    work = copy.deepcopy(model).double().eval()
    layers = _layers(work)
    totals: Tensors = {}

    def catch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            totals[name] = totals.get(name, 0) + _energy(module, args[0])

        return hook

    with torch.no_grad():
        for name, module in layers.items():
            if masks is not None:
                module.weight.mul_(masks[name])
            module.register_forward_pre_hook(catch(name))
        if isinstance(data, Mapping):
            work(**data)
        else:
            work(data[0].double())
    return {n: layers[n].weight.detach().abs() * totals[n].sqrt() for n in layers}


def row_masks(model: nn.Module, scores: Tensors, sparsity: float) -> Tensors:
    """The best `c - floor(sparsity * c)` of the c inputs of every output, by a stable sort."""
    layers, found = _layers(model), {}
    for name, score in scores.items():
        conv1d = type(layers[name]).__name__ == "Conv1D"
        rows = score.T.contiguous() if conv1d else score.flatten(1)
        inputs = rows.shape[1]
        keep = inputs - math.floor(sparsity * inputs)
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for row, values in zip(mask, rows, strict=True):
            row[values.sort(descending=True, stable=True).indices[:keep]] = True
        found[name] = mask.T.contiguous() if conv1d else mask.view(score.shape)
    return found
