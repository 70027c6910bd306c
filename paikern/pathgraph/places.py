"""Where the maps of both sweeps lie: one arena, shared by maps that are not needed together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from paikern.pathgraph import steps as kinds
from paikern.pathgraph.flow import Flow
from paikern.pathgraph.steps import Step

_ALIGN = 16  # floats: a cache line


@dataclass
class Map:
    """A map in the arena: alive from tick `first` to `last`."""

    numel: int
    first: int
    last: int
    offset: int = 0


@dataclass
class Value:
    root: int  # the value that first held these maps
    shape: tuple[int, ...]
    a: Map
    g: Map
    start: bool = False


def lay_out(
    flow: Flow,
    steps: Sequence[tuple[Step, tuple[int, ...], int]],
    values: Mapping[int, Value],
    keep: str,
    divided: dict[int, Map],
) -> int:
    """Give every map its interval and then its place; returns the floats of the arena.

    Ticks: step i runs forward at i and backward at 2 n - 1 - i. `divided` gets a map for every
    weight step whose input is divided by its maximum.
    """
    end = 2 * len(steps)
    for v in values.values():
        v.a.first, v.a.last = end, -1
        v.g.first, v.g.last = end, -1
    for i, (step, inputs, output) in enumerate(steps):
        back = end - 1 - i
        weight = isinstance(step, kinds.Weight)
        for j in inputs:
            v = values[j]
            read = back if (weight and not flow.by_input_max) or _reads_input(step) else i
            v.a.first = min(v.a.first, 0 if v.start else i)
            v.a.last = max(v.a.last, end if weight and keep == "scores" else read)
            v.g.first = min(v.g.first, back)
            v.g.last = max(v.g.last, back)
        out = values[output]
        out.a.first = min(out.a.first, i)
        out.a.last = max(out.a.last, i)
        if (weight and keep == "nodes") or isinstance(step, kinds.Rectify):
            out.a.last = max(out.a.last, back)
        out.g.first = min(out.g.first, back)
        out.g.last = max(out.g.last, end if weight and keep == "scores" else back)
        if weight and flow.by_input_max:
            divided[i] = Map(math.prod(values[inputs[0]].shape), i, back)
    for j in flow.plan.outputs:
        v = values[j]
        v.a.last = max(v.a.last, len(steps))
        v.g.first = min(v.g.first, len(steps))
        v.g.last = max(v.g.last, len(steps))
    own = [v for id_, v in values.items() if v.root == id_]
    maps = [m for v in own for m in ((v.a,) if v.start else (v.a, v.g))]
    return _place(maps + list(divided.values()))


def pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = (values[0], values[0]) if len(values) == 1 else values
    return first, second


def _reads_input(step: Step) -> bool:
    """Whether a callback keeps a view of its input for the adjoint."""
    return isinstance(step, kinds.Replay) and step.keep_input


def shapes_of(flow: Flow) -> dict[int, tuple[int, ...]]:
    """The shape of every value of the plan; steps that do not say theirs are run on zeros."""
    shapes: dict[int, tuple[int, ...]] = dict(flow.graph.inputs)
    for step, inputs, output in flow.plan.steps:
        if hasattr(step, "out_shape"):
            shapes[output] = step.out_shape
        elif isinstance(step, (kinds.Norm, kinds.Rectify)):
            shapes[output] = shapes[inputs[0]]
        else:
            with torch.no_grad():
                given = [torch.zeros(shapes[i]) for i in inputs]
                shapes[output] = tuple(step.forward(given)[0].shape)
    return shapes


def values_of(flow: Flow) -> dict[int, Value]:
    """One a value; those that a reshape joins share their maps."""
    found: dict[int, Value] = {}
    shapes = shapes_of(flow)
    for id_ in flow.graph.inputs:
        found[id_] = _new_value(id_, shapes[id_], start=True)
    for step, inputs, output in flow.plan.steps:
        if isinstance(step, kinds.Reshape):
            found[output] = replace(found[inputs[0]], shape=shapes[output])
        else:
            found[output] = _new_value(output, shapes[output])
    return found


def _new_value(id_: int, shape: tuple[int, ...], start: bool = False) -> Value:
    numel = math.prod(shape)
    return Value(id_, shape, Map(numel, 0, 0), Map(numel, 0, 0), start)


def _place(maps: list[Map]) -> int:
    """Offsets such that maps alive at the same tick do not overlap: largest first, lowest fit."""
    placed: list[Map] = []
    top = 0
    for m in sorted(maps, key=lambda m: -m.numel):
        if m.last < m.first:
            continue
        rivals = sorted(
            (o.offset, o.offset + o.numel)
            for o in placed
            if o.first <= m.last and m.first <= o.last
        )
        at = 0
        for low, high in rivals:
            if at + m.numel <= low:
                break
            at = max(at, -(-high // _ALIGN) * _ALIGN)
        m.offset = at
        placed.append(m)
        top = max(top, at + m.numel)
    return top


__all__ = ["Map", "Value", "lay_out", "pair", "shapes_of", "values_of"]
