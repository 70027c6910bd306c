"""Topology of a dense or masked network: log paths, effective nodes, kernels and parameters.

Definitions (DPaI, Xiang et al., ICLR 2025, effective paths and nodes; `docs/analyze.md`). Weights
are replaced by their masks, norms and activations by the identity, biases dropped, the input is
ones. With incoming counts `Z`, outgoing counts `G` and `q = d log R / d M`:

- `log_paths`: log of R, the sum of the outputs, which is the number of effective paths (a mean
  pool counts as a mean).
- effective parameter: kept and `q > 0`. Effective kernel: a pair (output unit, input unit) with
  at least one effective weight; for a linear layer that is the single weight.
- effective node: an output unit of a layer with at least one path through it, shortcuts and the
  output layer included.
- input node: the other definition in use (NPB's program): an input unit of a layer, 1x1 shortcuts
  left out, or an output unit of the last linear layer, with at least one path through it. The two
  counts must not be compared with each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.pathgraph import Flow, PathGraph, Semantics, Visit, weights
from paikern.pathgraph.steps import Add, Step, Weight


@dataclass(frozen=True)
class LayerTopology:
    """One prunable parameter in a `Topology`.

    `nodes` (output units) and `kernels` (pairs of output and input unit) are totals, `effective_*`
    count those on a path. `dead_channels` are the output units that no path passes through.

    Example:
        >>> import torch, paikern as pk
        >>> masks = pk.MaskSet.from_bool({"weight": torch.tensor([[1, 0, 1], [0, 0, 0]])})
        >>> top = pk.analyze(torch.nn.Linear(3, 2), masks, example_inputs=torch.ones(1, 3))
        >>> layer = top.layers[0]
        >>> layer.effective_nodes, layer.nodes, layer.dead_channels, layer.effective_params
        (1, 2, (1,), 2)
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    kept: int
    nodes: int
    effective_nodes: int
    kernels: int
    effective_kernels: int
    effective_params: int
    dead_channels: tuple[int, ...]

    @property
    def dead(self) -> bool:
        """No path passes through this layer."""
        return self.effective_params == 0

    @property
    def density(self) -> float:
        """Fraction of the weights that is kept, on a path or not."""
        return self.kept / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Topology:
    """What `pk.analyze` returns: totals, and the same for each layer.

    `log_paths` is the natural logarithm of the number of effective paths, -inf where none is left.
    `layers` are in the order of the model. `input_nodes` counts live inputs of layers instead of
    live outputs, see the definitions of this module.

    Example:
        >>> import torch, paikern as pk
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> top = pk.analyze(net, example_inputs=torch.ones(1, 3))
        >>> round(top.log_paths, 4), top.effective_nodes, top.effective_params
        (2.4849, 4, 10)
    """

    log_paths: float
    layers: tuple[LayerTopology, ...]
    input_nodes: int = 0

    @property
    def effective_nodes(self) -> int:
        return sum(layer.effective_nodes for layer in self.layers)

    @property
    def effective_kernels(self) -> int:
        return sum(layer.effective_kernels for layer in self.layers)

    @property
    def effective_params(self) -> int:
        return sum(layer.effective_params for layer in self.layers)

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @property
    def dead_layers(self) -> tuple[str, ...]:
        """Names of the layers that no path passes through."""
        return tuple(layer.name for layer in self.layers if layer.dead)

    @property
    def dead_channels(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> output channels that no path passes through, where there are any."""
        return {layer.name: layer.dead_channels for layer in self.layers if layer.dead_channels}


def topology(
    graph: PathGraph,
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    layers: Mapping[str, str],
) -> Topology:
    """Count what lies on a path.

    Args:
        graph: from `paikern.pathgraph.trace`.
        state: parameter and buffer names -> tensors; only shapes of weights are read.
        masks: parameter name -> packed mask; missing ones are dense.
        layers: the prunable parameters to report, name -> kind, in order.
    """
    # Sums of thousands of equal counts drift by 1e-5 of a log in float32; float64 has no such
    # error. What lies on a path is decided on float32 maps, where no positive count is lost.
    with registry.using("reference"):
        log_paths = Flow(graph, Semantics(power=0), dtype=torch.float64).forward(state, masks)
    flow = Flow(graph, Semantics(power=0))
    flow.forward(state, masks)
    reached = {name: torch.zeros(state[name].shape, dtype=torch.bool) for name in layers}

    def visit(v: Visit) -> None:
        if v.step.parameter not in reached:
            return
        q = weights.score(v.step, v.x, v.g, state, masks, 0)
        into = reached[v.step.parameter]
        if v.step.rows is not None:
            into = into[v.step.rows[0] : v.step.rows[1]]
        into |= (q > 0).to(into.device)

    if log_paths > -math.inf:
        flow.backward(visit)
    uses = graph.uses()
    found = []
    for name, kind in layers.items():
        steps = uses.get(name, [])
        found.append(_layer(name, kind, reached[name], masks.get(name), steps))
    return Topology(log_paths, tuple(found), _input_nodes(graph, reached))


def _layer(
    name: str, kind: str, on_path: Tensor, packed: Tensor | None, steps: list[Weight]
) -> LayerTopology:
    shape = tuple(on_path.shape)
    kept = on_path.numel() if packed is None else int(ops.unpack_mask(packed, shape).sum())
    units = on_path.flatten(2).any(-1) if on_path.dim() > 2 else on_path  # [rows, columns]
    per_output, outputs = _by_output(units, steps)
    dead = tuple(int(i) for i in torch.nonzero(~per_output).flatten())
    return LayerTopology(
        name=name,
        kind=kind,
        shape=shape,
        numel=on_path.numel(),
        kept=kept,
        nodes=outputs,
        effective_nodes=outputs - len(dead),
        kernels=units.numel(),
        effective_kernels=int(units.sum()),
        effective_params=int(on_path.sum()),
        dead_channels=dead,
    )


def _input_nodes(graph: PathGraph, reached: Mapping[str, Tensor]) -> int:
    skipped, uses = shortcuts(graph), graph.uses()
    linear = [step.parameter for step in graph.weights if step.kind == "linear"]
    count = 0
    for name, on_path in reached.items():
        if name in skipped or name not in uses:
            continue
        units = on_path.flatten(2).any(-1) if on_path.dim() > 2 else on_path
        step = uses[name][0]
        if step.transposed:
            count += int(units.any(1).sum())
        else:  # [out, in / groups]
            count += int(units.unflatten(0, (step.groups, -1)).any(1).sum())
        if linear and name == linear[-1]:
            count += int(_by_output(units, uses[name])[0].sum())
    return count


def shortcuts(graph: PathGraph) -> frozenset[str]:
    """The 1x1 convolutions of residual shortcuts.

    Such a convolution reads a value that another step reads too, and between it and an addition
    there are only steps of one input without weights.
    """
    readers: dict[int, list[Step]] = {}
    for step in graph.steps:
        for value in step.inputs:
            readers.setdefault(value, []).append(step)
    found = set()
    for weight in graph.weights:
        if weight.kind != "conv" or any(size != 1 for size in weight.kernel):
            continue
        after = readers.get(weight.output, [])
        while len(after) == 1 and len(after[0].inputs) == 1 and not isinstance(after[0], Weight):
            after = readers.get(after[0].output, [])
        joins = len(after) == 1 and isinstance(after[0], Add)
        if joins and len(readers[weight.inputs[0]]) > 1:
            found.add(weight.parameter)
    return frozenset(found)


def _by_output(units: Tensor, steps: list[Weight]) -> tuple[Tensor, int]:
    """Which output units are reached. Transposed weights are stored `[in, out / groups]`."""
    if not steps or not steps[0].transposed:
        return units.any(1), units.shape[0]
    grouped = units.unflatten(0, (steps[0].groups, -1)).any(1)  # [groups, out / groups]
    return grouped.flatten(), grouped.numel()
