"""PX as it is commonly run: three masked networks a round, one autograd pass, one global kthvalue.

    R = sum_n sum_k g_k(x_n**2) h_k,   S_l = W_l**2 * dR/dW_l**2,   T rounds, exponential schedule

For each batch of a round f, the model in eval mode, gives the gates of its ReLUs; g, weights of
one, no bias, no norm, runs on x**2 through those gates; h, squared weights and norms, no bias, no
gates, runs on ones; their product is differentiated. Gradients add up over the batches. Source:
specification of the path family, section 6.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from bench.references.layers import first_tensor, prunable_layers, replace_modules, run_layer
from bench.references.selection import Masks, Scores, round_removals, select_global

_NORMS = nn.modules.batchnorm._BatchNorm


class _Program:
    """Which of the three networks the shared modules are at the moment, and the gates of f."""

    def __init__(self) -> None:
        self.network = "f"
        self.gates: list[Tensor] = []


class _Layer(nn.Module):
    """A Linear or Conv whose weight is multiplied by a float mask in every forward."""

    mask: Tensor

    def __init__(self, layer: nn.Module, program: _Program) -> None:
        super().__init__()
        self.geometry = [layer]  # in a list: the layer must not register its parameters twice
        self.program = program
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast("nn.Parameter | None", layer.bias)
        self.squared = nn.Parameter(self.weight.detach() ** 2)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        if self.program.network == "f":
            return run_layer(self.geometry[0], x, self.mask * self.weight, self.bias)
        weight = self.mask if self.program.network == "g" else self.mask * self.squared
        return run_layer(self.geometry[0], x, weight)


class _Norm(nn.Module):
    """A BatchNorm: itself in f, nothing in g, a squared scale in h."""

    def __init__(self, norm: nn.Module, program: _Program) -> None:
        super().__init__()
        self.norm = cast(nn.BatchNorm2d, norm)
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        if self.program.network == "f":
            return cast(Tensor, self.norm(x))
        if self.program.network == "g":
            return x
        scale = self.norm.weight.detach() ** 2 / (
            cast(Tensor, self.norm.running_var) + self.norm.eps
        )
        return x * scale.view(1, -1, *(1 for _ in x.shape[2:]))


class _Gate(nn.Module):
    """A ReLU: itself in f, whose gates it notes; those gates in g; nothing in h."""

    def __init__(self, program: _Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        if self.program.network == "f":
            self.program.gates.append(x > 0)
            return torch.relu(x)
        return x * self.program.gates.pop(0) if self.program.network == "g" else x


def _score(
    model: nn.Module,
    layers: dict[str, _Layer],
    program: _Program,
    batches: Sequence[Tensor],
    one_h: bool,
) -> Scores:
    model.zero_grad()
    for x in batches:
        program.gates.clear()
        with torch.no_grad():
            program.network = "f"
            model(x)
            program.network = "g"
            paths = first_tensor(model(x**2))
        program.network = "h"
        flow = first_tensor(model(torch.ones_like(x[:1] if one_h else x)))
        (paths * flow).sum().backward()
    return {
        name: (cast(Tensor, layer.squared.grad) * layer.squared.detach()).abs_()
        for name, layer in layers.items()
    }


def px(
    model: nn.Module,
    batches: Sequence[Tensor],
    sparsity: float,
    rounds: int = 100,
    *,
    schedule: str = "exponential",
    selection: str = "published",
    dtype: torch.dtype = torch.float32,
    one_h: bool = False,
) -> Masks:
    """Return name -> bool mask of `model`, which is left untouched.

    `batches` are inputs; labels are not used. `selection` is "published" (ties at the threshold go)
    or "exact" (lower index, exact count). h does not depend on the sample but is commonly run on a
    batch of ones of the size of x; `one_h` runs it on a single one, which gives the same scores.
    g of a dense ResNet reaches 1e50: scores overflow float32 there, so use `dtype=torch.float64`
    where the values matter; the time of a float32 run does not depend on them.
    """
    program = _Program()
    work = copy.deepcopy(model).to(dtype).eval()
    masked = {id(layer): _Layer(layer, program) for layer in prunable_layers(work).values()}
    layers = dict(zip(prunable_layers(work), masked.values(), strict=True))

    def replacement(module: nn.Module) -> nn.Module | None:
        if id(module) in masked:
            return masked[id(module)]
        if isinstance(module, _NORMS):
            return _Norm(module, program)
        return _Gate(program) if isinstance(module, (nn.ReLU, nn.ReLU6)) else None

    work = replace_modules(work, replacement)
    data = [x.to(dtype) for x in batches]
    total = sum(layer.weight.numel() for layer in layers.values())
    masks: Masks = {}
    for removed in round_removals(total, sparsity, rounds, schedule):
        masks = select_global(_score(work, layers, program, data, one_h), removed, selection)
        for name, layer in layers.items():
            layer.mask.copy_(masks[name])
    return masks
