"""NTK-SAP as it is commonly run: two masked copies of the network, one kthvalue a round.

    J = sum_n ||f(x_n; m * theta) - f(x_n; m * (theta + eps * xi))||^2,
    S = |sum dJ/dm| where m != 0

Masked layers multiply weight and mask in every forward pass and let autograd differentiate by the
mask, which both copies share. For each resample and batch of a round: new Kaiming weights and norms
of 1 and 0, x ~ N(0, 1), a pass in train mode for the statistics of the batch norms (momentum 1),
then both networks in eval mode and one backward pass through both. Source: specification of the
gradient family, section 5.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from bench.references.layers import first_tensor, prunable_layers, replace_modules, run_layer
from bench.references.selection import Masks, round_removals, select_global

_NORMS = nn.modules.batchnorm._BatchNorm


class _Masked(nn.Module):
    """A Linear or Conv with a frozen weight and a mask that is differentiated."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Module, mask: nn.Parameter) -> None:
        super().__init__()
        self.geometry = [layer]  # in a list: the layer must not register its parameters twice
        self.mask = mask
        self.register_buffer("weight", cast(Tensor, layer.weight).detach().clone())
        bias = cast("Tensor | None", layer.bias)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return run_layer(self.geometry[0], x, self.mask * self.weight, self.bias)


def _masked_copy(model: nn.Module, masks: dict[str, nn.Parameter]) -> nn.Module:
    work = copy.deepcopy(model)
    layers = {
        id(layer): _Masked(layer, masks[name]) for name, layer in prunable_layers(work).items()
    }
    work = replace_modules(work, lambda module: layers.get(id(module)))
    for module in work.modules():
        if isinstance(module, _NORMS):
            module.momentum = 1.0
            module.requires_grad_(False)
    return work


def _layers(model: nn.Module) -> list[_Masked]:
    return [module for module in model.modules() if isinstance(module, _Masked)]


def _norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _NORMS)]


def _draw(near: nn.Module, generator: torch.Generator) -> None:
    """New weights, norms and biases of the unchanged network."""
    with torch.no_grad():
        for norm in _norms(near):
            cast(nn.BatchNorm2d, norm).reset_running_stats()
            cast(Tensor, norm.weight).fill_(1.0)
            cast(Tensor, norm.bias).zero_()
        for layer in _layers(near):
            std = (2 / layer.weight[0].numel()) ** 0.5
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator).mul_(std))
            if layer.bias is not None:
                layer.bias.zero_()


def _change(near: nn.Module, far: nn.Module, epsilon: float, generator: torch.Generator) -> None:
    """The other network becomes the first, its weights changed a little."""
    for norm, other in zip(_norms(near), _norms(far), strict=True):
        other.load_state_dict(norm.state_dict())
    for layer, moved in zip(_layers(near), _layers(far), strict=True):
        noise = torch.randn(layer.weight.shape, generator=generator)
        moved.weight.copy_(layer.weight + epsilon * noise.to(layer.weight))
        if moved.bias is not None:
            moved.bias.zero_()


def ntk_sap(
    model: nn.Module,
    batches: Sequence[Tensor],
    sparsity: float,
    rounds: int = 20,
    *,
    resamples: int = 1,
    epsilon: float = 0.01,
    schedule: str = "exponential",
    selection: str = "published",
    seed: int = 0,
) -> Masks:
    """Return name -> bool mask of `model`, which is left untouched.

    Of `batches` only the shapes are used. `selection` is "published" (ties at the threshold go) or
    "exact" (lower index, exact count).
    """
    masks = {
        name: nn.Parameter(torch.ones_like(cast(Tensor, layer.weight)))
        for name, layer in prunable_layers(model).items()
    }
    near, far = _masked_copy(model, masks), _masked_copy(model, masks)
    total = sum(mask.numel() for mask in masks.values())
    found: Masks = {}
    for done, removed in enumerate(round_removals(total, sparsity, rounds, schedule)):
        generator = torch.Generator().manual_seed(seed + done)
        for mask in masks.values():
            mask.grad = None
        for _ in range(resamples):
            for batch in batches:
                _draw(near, generator)
                x = torch.randn(batch.shape, generator=generator).to(batch)
                near.train()
                with torch.no_grad():
                    near(x)
                near.eval()
                far.eval()
                _change(near, far, epsilon, generator)
                change = first_tensor(near(x)) - first_tensor(far(x))
                change.square().sum().backward()
        scores = {
            name: cast(Tensor, mask.grad).abs() * (mask.detach() != 0)
            for name, mask in masks.items()
        }
        found = select_global(scores, removed, selection)
        with torch.no_grad():
            for name, mask in masks.items():
                mask.copy_(found[name])
    return found
