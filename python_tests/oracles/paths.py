"""Weighted path counts by float64 autograd through the model's own forward.

R = sum of all outputs of the network with weights V_l = M_l * |W_l|**p, an input of ones, no
biases, norms and activations as `rules.py` says. The gradients are autograd's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from python_tests.oracles.rules import PathSemantics

_CONV_OR_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass
class LayerFlow:
    """One prunable weight: V and dR/dV of its shape; A, Z and G of each call of its module.

    `inputs`, `outputs`, `output_gradients` (A, Z, G = dR/dZ) are empty for weights that their
    module does not run itself (inside `nn.MultiheadAttention`).
    """

    weight: Tensor
    gradient: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    output_gradients: list[Tensor] = field(default_factory=list)


@dataclass
class PathFlow:
    """R, log R (-inf for a dead network) and the flow of every layer, by parameter name."""

    total: float
    log_total: float
    layers: dict[str, LayerFlow]

    def mask_gradient(self, name: str) -> Tensor:
        """q = d log R / dV, zeros in a dead network."""
        gradient = self.layers[name].gradient
        return gradient / self.total if self.total > 0 else torch.zeros_like(gradient)


def is_conv1d(module: nn.Module) -> bool:
    """Tell `Conv1D`, which computes `x @ weight` with weight `[in, out]`, by its class name."""
    return type(module).__name__ == "Conv1D"


def prunable(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Parameter]]:
    """Return parameter name -> (module, weight) in pre-order.

    Every Linear, convolution, Conv1D weight and attention `in_proj_weight`; a storage used twice
    counts once and one that an embedding shares does not count.
    """
    seen = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[str, tuple[nn.Module, nn.Parameter]] = {}
    for prefix, module in model.named_modules():
        for kind, name in (
            (isinstance(module, _CONV_OR_LINEAR) or is_conv1d(module), "weight"),
            (isinstance(module, nn.MultiheadAttention), "in_proj_weight"),
        ):
            parameter = getattr(module, name, None) if kind else None
            if isinstance(parameter, nn.Parameter) and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{prefix}.{name}" if prefix else name] = (module, parameter)
    return found


def first_tensor(output: object) -> Tensor:
    """Return a model's output tensor, the first one of a tuple, list or dict."""
    if isinstance(output, Tensor):
        return output
    values = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(values, list | tuple) and values:
        return first_tensor(values[0])
    raise ValueError(f"model: output must hold a tensor, got {type(output).__name__}")


def path_oracle(
    model: nn.Module,
    example_input: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    p_net: int = 0,
    norm: str = "identity",
    keep_bias: bool = False,
    cotangent: Tensor | None = None,
) -> PathFlow:
    """Return totals and gradients of the path network of `model`, which is left untouched.

    Args:
        example_input: gives shape and kind only; floats become ones of one sample.
        masks: parameter name -> bool or 0/1 tensor; layers left out are dense.
        weights: parameter name -> tensor used in place of the model's own weight.
        p_net: exponent of |W|; 0 counts paths and never reads the weights.
        norm: "identity", or "scale" (a positive scale to the power of `p_net`, see `rules`).
        keep_bias: add |bias| instead of dropping biases.
        cotangent: c, broadcast to the output; ones by default.
    """
    work = copy.deepcopy(model).double().eval()
    layers = prunable(work)
    _drop_offsets(work, keep_bias)
    with torch.no_grad():
        for name, (_, parameter) in layers.items():
            weight = parameter if weights is None or name not in weights else weights[name].double()
            value = torch.ones_like(weight) if p_net == 0 else weight.abs() ** p_net
            if masks is not None and name in masks:
                # Not a product: a pruned NaN counts as 0.
                value = torch.where(masks[name].bool(), value, torch.zeros_like(value))
            parameter.copy_(value)
        for module in work.modules():
            if isinstance(module, nn.Embedding):  # a tied output layer reads it
                module.weight.copy_(module.weight.abs() ** p_net)

    flows: dict[str, LayerFlow] = {}
    handles = []
    for name, (module, parameter) in layers.items():
        flows[name] = LayerFlow(parameter.detach(), torch.zeros_like(parameter))
        handles.append(module.register_forward_hook(_recorder(flows[name])))

    sample = example_input[:1]
    ones = torch.ones_like(sample, dtype=torch.float64) if sample.is_floating_point() else sample
    with PathSemantics(norm, ones, p_net):
        output = first_tensor(work(ones))
    total = (output if cotangent is None else output * cotangent.double()).sum()
    for handle in handles:
        handle.remove()

    outputs = [z for flow in flows.values() for z in flow.outputs]
    parameters = [parameter for _, parameter in layers.values()]
    gradients = torch.autograd.grad(total, [*parameters, *outputs], allow_unused=True)
    for flow, gradient in zip(flows.values(), gradients, strict=False):
        if gradient is not None:
            flow.gradient = gradient
    rest = iter(gradients[len(parameters) :])
    for flow in flows.values():
        for z in flow.outputs:
            gradient = next(rest)
            flow.output_gradients.append(torch.zeros_like(z) if gradient is None else gradient)
        flow.outputs = [z.detach() for z in flow.outputs]
    paths = total.item()
    if not math.isfinite(paths):
        raise OverflowError(f"path_oracle: the total of this network is {paths} in float64")
    return PathFlow(paths, math.log(paths) if paths > 0 else -math.inf, flows)


def _drop_offsets(model: nn.Module, keep_bias: bool) -> None:
    """Zero what adds a constant: biases (or make them positive), positions, class tokens."""
    prunable_ids = {id(parameter) for _, parameter in prunable(model).values()}
    kept = {
        id(parameter)
        for module in model.modules()
        if "Norm" in type(module).__name__ or isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in prunable_ids or id(parameter) in kept:
                continue
            if keep_bias and name.rpartition(".")[2].endswith("bias"):
                parameter.abs_()
            else:
                parameter.zero_()


def _recorder(flow: LayerFlow):  # type: ignore[no-untyped-def]
    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            flow.inputs.append(inputs[0].detach())
            flow.outputs.append(output)

    return record
