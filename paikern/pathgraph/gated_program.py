"""A path graph as a program of whole layers for `GatedProgram`, the native f and g of PX.

Weight, norm, residual add and ReLU become one step where each has only the next as its reader.
What a program cannot hold (attention, concatenation, a norm without running statistics, ReLU6, a
pool that is replayed) gives None, and `gated.GatedModel` runs instead. A path graph also leaves out
what carries no path, such as an added position, so a program has to be compared with the model
once before it is trusted: `agrees` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from paikern.backends import registry
from paikern.errors import BackendError
from paikern.pathgraph.graph import PathGraph
from paikern.pathgraph.steps import Add, MaxPool, Mean, Norm, Rectify, Reshape, State, Step, Weight

_WEIGHT, _ELEMENTWISE, _MEAN, _MAX_POOL, _RESHAPE = range(5)
_POINT = (1, 1, 1, 1, 1, 0, 0, 1, 1)  # groups, kernel, stride, padding, dilation of a linear layer
_CLOSE = 1e-2  # a gate at a pre-activation of almost 0 may fall either way

Shape = tuple[int, int, int]
_Affine = tuple[Tensor | None, Tensor | None]


@dataclass
class _Node:
    """One step of the program; values are those of the graph until maps are assigned."""

    kind: int
    source: int
    out: int
    geometry: tuple[int, ...] = _POINT
    weight: Weight | None = None
    norms: list[Norm] = field(default_factory=list)
    add: int | None = None
    gate: bool = False

    @property
    def open(self) -> bool:
        """Whether an add or a gate may still be joined to this node."""
        return self.kind in (_WEIGHT, _ELEMENTWISE) and not self.gate


class _UnsupportedError(Exception):
    pass


class GatedGraph:
    """The native f and g of a graph, see `lower`; the interface of `gated.GatedModel`."""

    def __init__(
        self, nodes: list[_Node], maps: list[Shape], program: Any, shape: tuple[int, ...]
    ) -> None:
        self._nodes = nodes
        self._program = program
        self._shape = shape
        self._state: State | None = None
        self._affines: list[_Affine] = []
        self.maps = maps

    @torch.no_grad()
    def load(self, state: State, masks: Mapping[str, Tensor]) -> None:
        """Take theta, norms and M of one round; a weight that `masks` does not name is dense.

        Biases and norms are read once for each `state` object: between rounds only masks change.
        """
        if state is not self._state:
            self._state = state
            self._affines = [_affine(node, state) for node in self._nodes]
        weights = []
        for index, node in enumerate(self._nodes):
            if node.kind > _ELEMENTWISE:
                continue
            weight = None if node.weight is None else state[node.weight.parameter]
            mask = None if node.weight is None else masks.get(node.weight.parameter)
            weights.append((index, weight, mask, *self._affines[index]))
        self._program.load(weights)

    @torch.no_grad()
    def totals(self, x: Tensor) -> list[tuple[Tensor, int]]:
        """`sum_n g(x_n**2)` of the output, `[1, ...]` in float64 with an exponent."""
        total, exponent, _ = self._program.run(x)
        return [(total.reshape(self._shape), exponent)]

    @torch.no_grad()
    def agrees(self, x: Tensor, outputs: Tensor, totals: list[tuple[Tensor, int]]) -> bool:
        """Whether f and g on a few samples are those of the model itself."""
        if len(totals) != 1:
            return False
        total, exponent, f = self._program.run(x)
        expected, other = totals[0]
        paths = total * 2.0 ** max(-1000, min(1000, exponent - other))
        return _close(f.flatten(), outputs.flatten()) and _close(paths, expected.flatten())


def lower(
    graph: PathGraph, state: State, device: str, dtype: torch.dtype, pool_gate: bool
) -> GatedGraph | None:
    """The program of `graph`, or None where it has none or no backend runs it."""
    try:
        make = registry.resolve("gated_program", device, dtype == torch.float64)
        nodes, shapes = _nodes(graph, state)
        maps, number = _assign(nodes, shapes, next(iter(graph.inputs)))
    except (BackendError, _UnsupportedError):
        return None
    steps = [
        (
            node.kind, number[node.source], number[node.out],
            -1 if node.add is None else number[node.add], int(node.gate), int(pool_gate),
            *node.geometry,
        )
        for node in nodes
    ]  # fmt: skip
    program = make(maps, steps, number[nodes[-1].out])
    return GatedGraph(nodes, maps, program, shapes[graph.outputs[0]])


def _nodes(graph: PathGraph, state: State) -> tuple[list[_Node], dict[int, tuple[int, ...]]]:
    if len(graph.inputs) != 1 or len(graph.outputs) != 1 or not graph.steps:
        raise _UnsupportedError
    ((start, shape),) = graph.inputs.items()
    shapes = {start: shape}
    readers = Counter(i for step in graph.steps for i in step.inputs)
    readers[graph.outputs[0]] += 1
    nodes: list[_Node] = []
    made: dict[int, int] = {}  # value -> index of its node

    def joins(value: int) -> _Node | None:
        """The open node that makes `value` for one reader only."""
        index = made.get(value)
        node = None if index is None else nodes[index]
        return node if node is not None and node.open and readers[value] == 1 else None

    def become(node: _Node, value: int) -> None:
        made[value] = made.pop(node.out)
        node.out = value

    for step in graph.steps:
        out, source = step.output, step.inputs[0]
        held = joins(source)
        if isinstance(step, Norm):
            shapes[out] = shapes[source]
            if step.var is None:
                raise _UnsupportedError
            if held is not None and held.add is None:
                held.norms.append(step)
                become(held, out)
                continue
            nodes.append(_Node(_ELEMENTWISE, source, out, norms=[step]))
        elif isinstance(step, Rectify):
            shapes[out] = shapes[source]
            if step.op not in ("aten.relu", "aten.relu_"):
                raise _UnsupportedError
            if held is not None:
                held.gate = True
                become(held, out)
                continue
            nodes.append(_Node(_ELEMENTWISE, source, out, gate=True))
        elif isinstance(step, Add):
            shapes[out] = shapes[source]
            if len(step.inputs) != 2 or set(step.in_shapes) != {step.out_shape}:
                raise _UnsupportedError
            if (last := _last_branch(step, nodes, made, joins)) is not None:
                last.add = next(i for i in step.inputs if i != last.out)
                become(last, out)
                continue
            nodes.append(_Node(_ELEMENTWISE, source, out, add=step.inputs[1]))
        else:
            nodes.append(_other(step, state))
            shapes[out] = cast(Any, step).out_shape
        made[out] = len(nodes) - 1
    if nodes[-1].out != graph.outputs[0]:
        raise _UnsupportedError
    return nodes, shapes


def _last_branch(step: Step, nodes: list[_Node], made: dict[int, int], joins: Any) -> _Node | None:
    """The node to which an add is joined: the later of its branches, if that is still open."""
    first, second = sorted(step.inputs, key=lambda value: made.get(value, -1))
    node: _Node | None = joins(second)
    if first == second or node is None or node.add is not None:
        return None
    return node


def _other(step: Step, state: State) -> _Node:
    if isinstance(step, Weight):
        if step.transposed or step.rows is not None:
            raise _UnsupportedError
        if step.kind == "linear":
            return _Node(_WEIGHT, step.inputs[0], step.output, weight=step)
        if len(step.stride) != 2:
            raise _UnsupportedError
        kernel = state[step.parameter].shape[2:]
        geometry = (step.groups, *kernel, *step.stride, *step.padding, *step.dilation)
        return _Node(_WEIGHT, step.inputs[0], step.output, geometry, weight=step)
    if isinstance(step, Mean):
        if not step.average or step.dims != (2, 3) or len(step.in_shape) != 4:
            raise _UnsupportedError
        return _Node(_MEAN, step.inputs[0], step.output)
    if isinstance(step, MaxPool):
        if step.spatial != 2 or len(step.in_shape) != 4:
            raise _UnsupportedError
        geometry = (1, *step.kernel, *step.stride, *step.padding, *step.dilation)
        return _Node(_MAX_POOL, step.inputs[0], step.output, geometry)
    if isinstance(step, Reshape) and step.in_shape[0] == step.out_shape[0] == 1:
        return _Node(_RESHAPE, step.inputs[0], step.output)
    raise _UnsupportedError


def _map(shape: tuple[int, ...]) -> Shape:
    """`[1, C, H, W]` or `[1, C]` as (channels, h, w)."""
    if len(shape) not in (2, 4) or shape[0] != 1:
        raise _UnsupportedError
    return (shape[1], 1, 1) if len(shape) == 2 else (shape[1], shape[2], shape[3])


def _assign(
    nodes: list[_Node], shapes: dict[int, tuple[int, ...]], start: int
) -> tuple[list[Shape], dict[int, int]]:
    """A map for each value; one that nobody reads any more serves the next value of its shape."""
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        last.update({value: index for value in (node.source, node.add) if value is not None})
    maps, number, free = [_map(shapes[start])], {start: 0}, list[int]()
    for index, node in enumerate(nodes):
        shape = _map(shapes[node.out])
        found = next((m for m in free if maps[m] == shape), None)
        if found is None:
            maps.append(shape)
            found = len(maps) - 1
        else:
            free.remove(found)
        number[node.out] = found
        ended = {node.source, node.add} - {None, start}
        free.extend(number[v] for v in ended if v is not None and last[v] == index)
    return maps, number


def _affine(node: _Node, state: State) -> _Affine:
    """The scale and shift of f that a bias and the norms behind it make together."""
    bias = None if node.weight is None else node.weight.bias
    if bias is None and not node.norms:
        return None, None
    shift = torch.zeros((), dtype=torch.float64) if bias is None else bias(state).double()
    scale = torch.ones((), dtype=torch.float64)
    for norm in node.norms:
        assert norm.var is not None
        factor = (norm.var(state).double() + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight(state).double()
        shift = shift if norm.mean is None else shift - norm.mean(state).double()
        shift = shift * factor
        if norm.bias is not None:
            shift = shift + norm.bias(state).double()
        scale = scale * factor
    scale, shift = torch.broadcast_tensors(scale, shift)
    return scale.float().contiguous(), shift.float().contiguous()


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    wrong = (found.double() - expected.double()).abs().max()
    return bool(wrong <= _CLOSE * expected.double().abs().max())
