"""A walk graph flattened into the tensors that `paikern.ops.phew_walks` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paikern.backends.walk_blocks import table_blocks
from paikern.pathgraph.flow import device_of
from paikern.pathgraph.steps import State, Weight
from paikern.pathgraph.units import INPUT, WEIGHT, Node, Slot, WalkGraph, owners


@dataclass(frozen=True)
class Walks:
    """What walks need, in the order of `paikern.ops.phew_walks`.

    weights: one tensor a weight step, contiguous. geometry: int64 `[weights, 8]`: rows, cols, taps,
    groups, transposed, first bit (-1: not recorded), begin of the row and of the column tables.
    graph: nodes `[n, 8]`, slots `[s, 2]`, links `[l, 2]` (int64), index, owner, starts (int32).
    table_size: entries of the tables. width: most bits that a walk can pass. parts: parameter ->
    its first byte and number of bytes in the common bit string of `nbytes` bytes.
    """

    weights: list[Tensor]
    geometry: Tensor
    graph: list[Tensor]
    table_size: int
    width: int
    parts: dict[str, tuple[int, int]]
    nbytes: int


def flattened(
    graph: WalkGraph, state: State, shapes: Mapping[str, tuple[int, ...]], *, whole: bool = False
) -> Walks:
    """`graph` with the weights of `state`; bits are numbered by parameter in the order of `shapes`.

    Walks pass weights that are not in `shapes` without a record. `whole` records all taps of a
    kernel instead of one.

    Raises:
        ValueError: the network has no input or no output unit.
    """
    parts, nbytes = {}, 0
    for name, shape in shapes.items():
        size = (torch.Size(shape).numel() + 7) // 8
        parts[name] = (nbytes, size)
        nbytes += size
    device = device_of(state)
    held, rows, at = [], [], 0
    for node in graph.nodes:
        if node.step is not None:
            tensor, row = _geometry(node.step, state, parts, device)
            across, down = table_blocks(*row[:4])
            held.append(tensor)
            rows.append([*row, at, at + row[0] * across])
            at += row[0] * across + row[3] * row[1] * down
    geometry = torch.tensor(rows, dtype=torch.int64).view(len(rows), 8)
    tensors = _Lists(graph).tensors()
    if not len(tensors[-1]) or not graph.nodes[-1].units:
        raise ValueError("no unit of the input or none of the output carries a path")
    width = _longest(graph, geometry, whole)
    lists = [tensor.to(device) for tensor in tensors]
    return Walks(held, geometry.to(device), lists, at, width, parts, nbytes)


def _geometry(
    step: Weight, state: State, parts: Mapping[str, tuple[int, int]], device: torch.device
) -> tuple[Tensor, list[int]]:
    """The weight as stored and its rows, cols, taps, groups, transposed, first bit."""
    whole = state[step.parameter].detach()
    w = whole if step.rows is None else whole[step.rows[0] : step.rows[1]]
    w = (w.flatten(1) if step.kind == "linear" else w).to(device).contiguous()
    base = -1
    if step.parameter in parts:
        before = 0 if step.rows is None else step.rows[0] * w[0].numel()
        base = 8 * parts[step.parameter][0] + before
    taps = w[0, 0].numel()
    return w, [w.shape[0], w.shape[1], taps, step.groups, int(step.transposed), base]


def _longest(graph: WalkGraph, geometry: Tensor, whole: bool) -> int:
    """Most bits recorded on any way through the nodes."""
    longest: list[int] = []
    steps = iter(geometry.tolist())
    for node in graph.nodes:
        pairs = [pair for slot in node.slots for pair in (slot, slot.onward) if pair is not None]
        before = [longest[o] for pair in pairs for o in owners(graph.nodes, pair.sources)]
        here = 0
        if node.step is not None:
            row = next(steps)
            here = (row[2] if whole else 1) if row[5] >= 0 else 0
        longest.append(max(before, default=0) + here)
    return max(1, longest[-1])


class _Lists:
    """Collects the lists: unit -> units, as pointers into one index followed by what they hold."""

    def __init__(self, graph: WalkGraph) -> None:
        self.graph = graph
        self.index: list[Tensor] = []
        self.size = 0

    def tensors(self) -> list[Tensor]:
        nodes = self.graph.nodes
        slots: list[list[int]] = []
        links: list[list[list[int]]] = [[] for _ in nodes]
        rows, owner, starts, weight = [], [], [], 0
        for number, node in enumerate(nodes):
            first = len(slots)
            for slot in node.slots:
                onward = slot.onward or slot
                for source in owners(nodes, onward.sources):
                    links[source].append([len(slots), self._onward(nodes[source], onward)])
                slots.append([number, self._list(slot.meets, slot.sources, node.width)])
            here = weight if node.kind == WEIGHT else -1
            rows.append([node.kind, here, node.base, node.units, 0, 0, first, len(slots)])
            weight += node.kind == WEIGHT
            owner.append(torch.full((node.units,), number, dtype=torch.int32))
            if node.kind == INPUT:
                starts.append(torch.arange(node.base, node.base + node.units, dtype=torch.int32))
        flat: list[list[int]] = []
        for row, outgoing in zip(rows, links, strict=True):
            row[4:6] = [len(flat), len(flat) + len(outgoing)]
            flat += outgoing
        return [
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(slots, dtype=torch.int64).view(len(slots), 2),
            torch.tensor(flat, dtype=torch.int64).view(len(flat), 2),
            torch.cat(self.index).to(torch.int32),
            torch.cat(owner),
            torch.cat(starts),
        ]

    def _onward(self, node: Node, slot: Slot) -> int:
        """What the units of `node` meet in a slot."""
        inside = (slot.sources >= node.base) & (slot.sources < node.base + node.units)
        order = slot.sources[inside].argsort(stable=True)
        units = slot.sources[inside][order] - node.base
        return self._list(units, slot.meets[inside][order], node.units)

    def _list(self, keys: Tensor, values: Tensor, width: int) -> int:
        """A new list; `keys` ascend."""
        begin = self.size
        counts = torch.bincount(keys, minlength=width)
        pointers = torch.zeros(width + 1, dtype=torch.int64)
        pointers[1:] = counts.cumsum(0)
        self.index += [pointers + begin + width + 1, values]
        self.size += width + 1 + len(values)
        return begin
