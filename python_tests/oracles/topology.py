"""Effective nodes, kernels and weights of a masked model, by the definitions and float64 autograd.

    node     output unit o of a layer: sum over positions of Z[o] * G[o] > 0, at its own output
    weight   M = 1 and d log R / dM != 0
    kernel   (o, i) holds an effective weight; in a linear layer each weight is a kernel

Output layer and shortcuts are layers like the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from python_tests.oracles.paths import LayerFlow, is_conv1d, path_oracle, prunable


@dataclass(frozen=True)
class LayerCounts:
    """Counts of one layer; `dead_channels` are the output units that are not effective."""

    kept: int
    numel: int
    effective_nodes: int
    nodes: int
    effective_kernels: int
    kernels: int
    effective_params: int
    dead_channels: tuple[int, ...]


@dataclass(frozen=True)
class TopologyCounts:
    """Totals over the layers, and the layers by parameter name."""

    log_paths: float
    effective_nodes: int
    effective_kernels: int
    effective_params: int
    layers: dict[str, LayerCounts]


def _unit_axis(module: nn.Module) -> int:
    """Axis of the weight that numbers the output units (ungrouped where it is not axis 0)."""
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if transposed and getattr(module, "groups", 1) != 1:
        raise ValueError("topology_oracle: grouped transposed convolutions are not covered")
    return 1 if transposed or is_conv1d(module) else 0


def _node_flow(module: nn.Module, flow: LayerFlow) -> Tensor:
    """N(v) for every output unit, `[O]`."""
    axis = _unit_axis(module)
    if not flow.outputs:  # a weight that its module does not run: Z is linear in V
        product = flow.weight * flow.gradient
        return product.sum(dim=[d for d in range(product.dim()) if d != axis])
    per_unit = torch.zeros(flow.weight.shape[axis], dtype=torch.float64)
    for z, g in zip(flow.outputs, flow.output_gradients, strict=True):
        channel = 1 if isinstance(module, nn.modules.conv._ConvNd) else z.dim() - 1
        per_unit += (z * g).sum(dim=[d for d in range(z.dim()) if d != channel])
    return per_unit


def topology_oracle(
    model: nn.Module, masks: Mapping[str, Tensor] | None, example_input: Tensor
) -> TopologyCounts:
    """Return the effective topology of `model` under `masks` (name -> bool; None: dense)."""
    flow = path_oracle(model, example_input, masks, p_net=0)
    counts: dict[str, LayerCounts] = {}
    for name, (module, _) in prunable(model).items():
        layer = flow.layers[name]
        effective = (layer.weight > 0) & (layer.gradient != 0)  # shape of the weight
        kernel = effective if effective.dim() == 2 else effective.flatten(2).any(dim=2)
        node = _node_flow(module, layer) > 0  # [O]
        counts[name] = LayerCounts(
            kept=int((layer.weight > 0).sum()),
            numel=layer.weight.numel(),
            effective_nodes=int(node.sum()),
            nodes=node.numel(),
            effective_kernels=int(kernel.sum()),
            kernels=kernel.numel(),
            effective_params=int(effective.sum()),
            dead_channels=tuple((~node).nonzero().flatten().tolist()),
        )
    return TopologyCounts(
        log_paths=flow.log_total,
        effective_nodes=sum(layer.effective_nodes for layer in counts.values()),
        effective_kernels=sum(layer.effective_kernels for layer in counts.values()),
        effective_params=sum(layer.effective_params for layer in counts.values()),
        layers=counts,
    )
