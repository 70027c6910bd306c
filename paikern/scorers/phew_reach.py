"""How many weights biased walks can reach at all: what an error says when they find no more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paikern.pathgraph.steps import State, Weight
from paikern.pathgraph.units import INPUT, OUTPUT, WalkGraph


def reachable_weights(
    graph: WalkGraph, state: State, shapes: Mapping[str, tuple[int, ...]], *, whole: bool = False
) -> int:
    """Weights of `shapes` that a walk from the inputs or from the outputs passes with p > 0.

    A weight counts if its kernel is drawn from a unit that is reached and its element is drawn from
    the kernel: not zero, or zero like everything it is drawn from. With `whole`, all elements of a
    kernel that is drawn.
    """
    found = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for forwards in (True, False):
        _follow(graph, state, found, forwards, whole)
    return sum(int(mask.sum()) for mask in found.values())


def _follow(
    graph: WalkGraph, state: State, found: dict[str, Tensor], forwards: bool, whole: bool
) -> None:
    reached = torch.zeros(graph.units, dtype=torch.bool)
    for node in graph.nodes if forwards else reversed(graph.nodes):
        own = slice(node.base, node.base + node.units)
        if node.kind == (INPUT if forwards else OUTPUT):
            reached[own] = True
        if forwards:
            met = torch.zeros(node.width, dtype=torch.bool)
            for slot in node.slots:
                onward = slot.onward or slot
                met[onward.meets[reached[onward.sources]]] = True
            if node.kind != INPUT:
                reached[own] = met if node.step is None else _pass(node.step, state, met, found,
                                                                   True, whole)  # fmt: skip
            continue
        met = reached[own]
        if node.step is not None:
            met = _pass(node.step, state, met, found, False, whole)
        for slot in node.slots[:1] if node.step is not None else node.slots:
            reached[slot.sources[met[slot.meets]]] = True


def _pass(
    step: Weight, state: State, units: Tensor, found: dict[str, Tensor], forwards: bool, whole: bool
) -> Tensor:
    """Units on the other side of a weight; marks the weights drawn on the way."""
    w = state[step.parameter].detach().to("cpu")
    rows = slice(None) if step.rows is None else slice(*step.rows)
    part = w[rows].flatten(1) if step.kind == "linear" else w[rows]
    # [groups, rows of a group, cols, taps]
    live = (part != 0).reshape(step.groups, part.shape[0] // step.groups, part.shape[1], -1)
    kernels = live.any(-1)
    along = 2 if forwards == step.transposed else 1  # the side that is drawn
    drawn = kernels | ~kernels.any(along, keepdim=True)
    entered = units.reshape(step.groups, -1)
    drawn &= entered.unsqueeze(along)
    if step.parameter in found:
        taken = drawn.unsqueeze(-1) & (live | ~kernels.unsqueeze(-1) | whole)
        mask = found[step.parameter]
        mask[rows] |= taken.reshape(mask[rows].shape)
    return drawn.any(3 - along).flatten()
