"""Weights on no path, moved to where they are on one.

A weight is effective if it is kept and a path leads through it (`paikern.analysis`). All others are
given up. On the network of the effective ones each layer then spends what it gave up at places that
a path leads to and from: first in the kernels that hold most effective weights (where a kernel is a
single weight: at the inputs that do), then by the number of paths through the place, then by index.
What finds no place in its layer goes to the next layers that have room, in the order of the network
and round to the first; what no layer has room for stays where it was.

No effective weight is given up and every new one is effective at once, so effective weights and
paths never become fewer; the total stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paikern import ops
from paikern.ops.balanced_mask import KernelGrid
from paikern.ops.unpack_mask import count_kept
from paikern.pathgraph import Flow, Visit, weights
from paikern.scorers.base import Run


@dataclass(frozen=True)
class Placed:
    """How a layer is built: its shape and kernels, K, and t."""

    shape: tuple[int, ...]
    grid: KernelGrid
    transposed: bool
    capacity: int
    least: int


@dataclass
class _Layer:
    """Packed bits of the weights that stay or are new, and of those given up."""

    kept: Tensor
    dead: Tensor
    count: int  # of what there is to place here
    room: int = 0


def move_dead_weights(
    run: Run, flow: Flow, masks: dict[str, Tensor], placed: Mapping[str, Placed]
) -> None:
    """Repair `masks` in place, after a forward sweep of `flow` that built them in its order."""
    found: dict[str, _Layer] = {}

    def take(name: str, paths: Tensor) -> None:
        reached = ops.pack_mask(paths > 0)
        dead = masks[name] & ~reached
        found[name] = _Layer(masks[name] & reached, dead, count_kept(dead))

    _each_layer(flow, masks, take)
    layers = {name: found[name] for name in masks if name in found}  # in network order
    if not any(layer.count for layer in layers.values()):
        return

    def fill(name: str, paths: Tensor) -> None:
        layer = layers[name]
        free = _free(layer, paths, placed[name])
        layer.room = count_kept(free)
        adding = min(layer.count, layer.room)
        if adding:
            layer.kept = layer.kept | _best(layer, free, paths, adding, placed[name])
            layer.count -= adding
            layer.room -= adding

    def sweep() -> None:
        effective = {**masks, **{name: layer.kept for name, layer in layers.items()}}
        flow.forward(run.state, effective)
        _each_layer(flow, effective, fill)

    sweep()
    left = _pass_on(layers)
    if any(layer.count for layer in layers.values()):
        sweep()
    if left:
        run.notes.append(
            f"npb: {left} weights are kept on no path, there was no free place left on one"
        )
    for name, layer in layers.items():
        left, masks[name] = _kept_back(layer, left)


def _each_layer(
    flow: Flow, masks: Mapping[str, Tensor], act: Callable[[str, Tensor], None]
) -> None:
    """Sweep backwards; `act` gets the number of paths through every place, up to a factor.

    They are float32 in the shape of the parameter, whether the place is kept or not, once all
    steps that use the parameter have been visited.
    """
    waiting = {name: len(steps) for name, steps in flow.graph.uses().items()}
    several: dict[str, Tensor] = {}

    def visit(v: Visit) -> None:
        name = v.step.parameter
        if name not in masks:
            return
        waiting[name] -= 1
        q = weights.score(v.step, v.x, v.g, flow.state, {}, 0)
        shape = flow.state[name].shape
        if v.step.rows is None and name not in several and not waiting[name]:
            act(name, q.reshape(shape))
            return
        whole = several.setdefault(name, torch.zeros(shape, device=q.device))
        part = whole if v.step.rows is None else whole[v.step.rows[0] : v.step.rows[1]]
        # Only the order of the uses among each other is lost by leaving their exponents out.
        part += (q / ops.map_maximum(q) if bool(q.any()) else q).reshape(part.shape)
        if not waiting[name]:
            act(name, several.pop(name))

    flow.backward(visit)
    for name, paths in several.items():  # some of their uses lead to no output
        act(name, paths)


def _free(layer: _Layer, paths: Tensor, placed: Placed) -> Tensor:
    """Places that a path leads to and from, as many as a kernel may hold."""
    free = ops.pack_mask(paths > 0) & ~layer.kept
    if placed.capacity < placed.grid.positions:
        kernels = paths.flatten(2).shape
        room = placed.capacity - ops.unpack_mask(layer.kept, kernels).sum(2, keepdim=True)
        places = ops.unpack_mask(free, kernels)
        free = ops.pack_mask(places & (places.cumsum(2) <= room))
    return free


def _best(layer: _Layer, free: Tensor, paths: Tensor, count: int, placed: Placed) -> Tensor:
    groups, inputs, outputs, positions = placed.grid
    first, second = (inputs, outputs) if placed.transposed else (outputs, inputs)
    kept = ops.unpack_mask(layer.kept, (groups, first, second, positions))
    along = 3 if positions > 1 else 2 if placed.transposed else 1
    held = kept.sum(along, keepdim=True)  # in the kernel, or at the input
    ranks = 2.0 * held + (paths / paths.max()).view(kept.shape)
    (best,) = ops.topk_mask([ranks], [count], masks=[free])
    return best


def _pass_on(layers: Mapping[str, _Layer]) -> int:
    """Give what is left to layers with room; returns how many weights find none."""
    carry = 0
    for layer in layers.values():
        carry += layer.count
        layer.count = min(layer.room, carry)
        layer.room -= layer.count
        carry -= layer.count
    for layer in layers.values():
        more = min(layer.room, carry)
        layer.count += more
        carry -= more
    return carry


def _kept_back(layer: _Layer, count: int) -> tuple[int, Tensor]:
    """Leave up to `count` weights where they were, the lowest first; (the rest, the mask)."""
    if not count:
        return 0, layer.kept
    bits = ops.unpack_mask(layer.dead, (layer.dead.numel() * 8,))
    stay = torch.nonzero(bits).flatten()[:count]
    back = torch.zeros_like(bits).index_fill_(0, stay, True)
    return count - stay.numel(), layer.kept | ops.pack_mask(back)
