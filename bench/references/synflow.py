"""SynFlow as it is commonly run: masked layers, one autograd pass and one global kthvalue a round.

    R = sum(model_abs(ones)),   S_l = |dR/dW_l * W_l|,   T rounds, exponential schedule, eval mode

Every tensor of the state dict is replaced by its absolute value (biases, BN affine and statistics
too); signs are restored after the score. Source: specification of the path family, section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from bench.references.layers import (
    first_tensor,
    ones_like_input,
    prunable_layers,
    replace_modules,
    run_layer,
)
from bench.references.selection import Masks, Scores, round_removals, select_global


class MaskedLayer(nn.Module):
    """A Linear or Conv that multiplies its weight by a float mask in every forward."""

    mask: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.geometry = [
            layer
        ]  # in a list: the layer itself must not register its parameters twice
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast("nn.Parameter | None", layer.bias)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return run_layer(self.geometry[0], x, self.mask * self.weight, self.bias)


@torch.no_grad()
def _linearize(model: nn.Module) -> dict[str, Tensor]:
    signs = {}
    for name, tensor in model.state_dict().items():
        signs[name] = torch.sign(tensor)
        tensor.abs_()
    return signs


@torch.no_grad()
def _restore(model: nn.Module, signs: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        tensor.mul_(signs[name])


def _score(model: nn.Module, layers: dict[str, MaskedLayer], ones: Tensor) -> Scores:
    signs = _linearize(model)
    model.zero_grad()
    first_tensor(model(ones)).sum().backward()
    scores = {}
    for name, layer in layers.items():
        gradient = cast(Tensor, layer.weight.grad)
        scores[name] = (gradient * layer.weight.detach()).abs_()
    _restore(model, signs)
    return scores


def synflow(
    model: nn.Module,
    example: Tensor | tuple[int, ...],
    sparsity: float,
    rounds: int = 100,
    *,
    schedule: str = "exponential",
    selection: str = "published",
    dtype: torch.dtype = torch.float32,
    report: Callable[[int], object] | None = None,
) -> Masks:
    """Return name -> bool mask of `model`, which is left untouched.

    `example` is a batch or its shape `[batch, features...]`; the input is one sample of ones.
    `selection` is "published" (ties at the threshold go) or "exact" (lower index, exact count).
    Scores that overflow float32 (ResNet-50 at 224) leave nothing: use `dtype=torch.float64` there.
    `report` is called with the number of rounds done after each of them.
    """
    work = copy.deepcopy(model).to(dtype).eval()
    masked = {id(layer): MaskedLayer(layer) for layer in prunable_layers(work).values()}
    layers = dict(zip(prunable_layers(work), masked.values(), strict=True))
    work = replace_modules(work, lambda module: masked.get(id(module)))
    ones = ones_like_input(example, dtype)

    total = sum(layer.weight.numel() for layer in layers.values())
    masks: Masks = {}
    removals = round_removals(total, sparsity, rounds, schedule)
    for done, removed in enumerate(removals, 1):
        masks = select_global(_score(work, layers, ones), removed, selection)
        for name, layer in layers.items():
            layer.mask.copy_(masks[name])
        if report is not None:
            report(done)
    return masks
