"""What the references share: which layers are pruned, how one runs, how a copy is linearised.

Nothing here imports paikern: the references stay independent of what is compared with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Modules whose weight is pruned, in `modules()` pre-order, first layer and classifier included.
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

#: Norms, activations and dropout: the identity on a path network, whose values are all >= 0.
IDENTITY = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.Tanh,
    nn.LogSoftmax,
    nn.modules.dropout._DropoutNd,
)

_CONV = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class NotFinishedError(TimeoutError):
    """The time limit of a run was reached; the message says how far it had come."""


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return parameter name -> layer, in pre-order; a layer or weight used twice counts once.

    ValueError names a module whose weights the loops would silently leave dense, or feed with ones
    where it wants token ids.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention | nn.Embedding):
            raise ValueError(
                f"the plain loops cover Linear and Conv layers; {name} is a {type(module).__name__}"
            )
    seen: set[int] = set()
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PRUNABLE) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            layers[f"{name}.weight" if name else "weight"] = module
    if not layers:
        raise ValueError("prunable_layers: model has no Linear or Conv layer to prune")
    return layers


def run_layer(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run `layer` on `x` with another weight of the same shape, without a bias unless given."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    conv = cast(nn.Conv2d, layer)
    if conv.padding_mode != "zeros":
        raise ValueError(f"run_layer: padding_mode must be 'zeros', got {conv.padding_mode!r}")
    run = _CONV[type(conv)]
    return run(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def replace_modules(
    model: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]
) -> nn.Module:
    """Replace in place every submodule for which `replacement` returns a module; return the model.

    A module that appears in several places gets one replacement; the root may be replaced too.
    """
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in done:
            new = replacement(module)
            done[id(module)] = module if new is None else new
            if new is None:
                # named_children() hides the second name of a shared child; _modules does not.
                for name, submodule in module._modules.items():
                    if submodule is not None:
                        module._modules[name] = visit(submodule)
        return done[id(module)]

    return visit(model)


def ones_like_input(example: Tensor | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return ones of one sample, `[1, *features]`, from an example batch or from its shape.

    They are where the example is; from a shape on the CPU.
    """
    shape = tuple(example.shape) if isinstance(example, Tensor) else tuple(example)
    if len(shape) < 2 or 0 in shape[1:]:
        raise ValueError(f"example: shape must be [batch, features...] without 0, got {shape}")
    device = example.device if isinstance(example, Tensor) else None
    return torch.ones(1, *shape[1:], dtype=dtype, device=device)


def first_tensor(output: object) -> Tensor:
    """Return the tensor that a model gave, looking into a tuple, list or dict of one."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple) and output:
        return first_tensor(output[0])
    raise ValueError(f"model: output must be a tensor, got {type(output).__name__}")
