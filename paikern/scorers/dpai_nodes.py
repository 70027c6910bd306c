"""Keeping nodes alive in DPaI: a floor under the masks, and gradients for nodes that died.

The node term of the method raises the step of weights whose node is dead, but a node that is dead
on both sides has q = 0 on all its edges, so no factor brings it back, and under a budget nodes
fall while paths rise (ResNet-20 at 98 %: 793 to 431 in 100 steps of alpha = 0.99).

`hold_nodes` prevents that at the start: one weight into and one out of every unit is never given
up. All 794 nodes of that network then stay, every kept weight lies on a path, and ln R ends at 72.3
instead of 73.8 (alpha = 0). `Revival` is the weaker cure: dead sides borrow the counts of the
dense network, so that their edges have a gradient again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paikern import ops
from paikern.pathgraph import Flow, Semantics, Visit, weights
from paikern.pathgraph.steps import Weight
from paikern.scorers.base import Run

# Above any score that training reaches (steps * lr * k_l, below 2**40) and finite when Adam or
# float32 add to it: what is held neither moves nor falls below the threshold.
_HELD = 2.0**60


def hold_nodes(
    run: Run, s: Mapping[str, Tensor], kept: Sequence[int], uses: Mapping[str, Sequence[Weight]]
) -> None:
    """Put so many scores of each layer out of reach that every unit has an edge in and one out.

    In a layer of O output and I input units (of each group) that takes max(O, I) weights: output
    and input units are paired in an order drawn from the run's seed. In a convolution the middle of
    the kernel is held, the one position that leads from every place of a map to a place of the
    next, however small the map. Written to `s`; a layer that keeps fewer holds what it can, and a
    note of the run says so.
    """
    generator = torch.Generator().manual_seed(run.seed)
    short = []
    for (name, score), k in zip(s.items(), kept, strict=True):
        if score.dim() < 2 or not score.numel():
            continue
        groups = uses[name][0].groups if name in uses else 1
        rows, columns = score.shape[0] // groups, score.shape[1]
        pairs = max(rows, columns)
        order = torch.arange(pairs * groups)
        group, pair = order % groups, order // groups
        row = torch.randperm(rows, generator=generator)[pair % rows] + group * rows
        column = torch.randperm(columns, generator=generator)[pair % columns]
        if k < len(order):
            short.append(name)
            row, column = row[:k], column[:k]
        middle = 0
        for size in score.shape[2:]:
            middle = middle * size + size // 2
        taps = score.view(score.shape[0], columns, -1)
        sign = torch.where(taps[row, column, middle] < 0, -1.0, 1.0)
        taps[row, column, middle] = sign * _HELD
    if short:
        run.notes.append(
            f"dpai: keep_nodes: {', '.join(short)} "
            f"{'keeps' if len(short) == 1 else 'keep'} fewer weights than it has units, so not "
            "every unit has one"
        )


class Revival:
    """Counts that dead units borrow from the dense network, for `revive=True`.

    A unit without incoming paths takes its map from the sweep of the dense network, scaled by the
    sum of the live maps over theirs; a unit without outgoing ones likewise. On edges between live
    units nothing changes. The dense network is swept once.
    """

    def __init__(self, run: Run) -> None:
        self._dense: dict[int, tuple[Tensor, Tensor]] = {}
        flow = Flow(run.graph, Semantics(power=0))
        if flow.forward(run.state) == -math.inf:
            return

        def keep(v: Visit) -> None:
            self._dense[id(v.step)] = (v.x.clone(), v.g.clone())

        flow.backward(keep)

    def borrow(self, v: Visit) -> tuple[Tensor, Tensor]:
        """The two maps of a visit, with those of dead units filled in."""
        if id(v.step) not in self._dense:
            return v.x, v.g
        x, g = self._dense[id(v.step)]
        return _filled(v.x, x, v.step), _filled(v.g, g, v.step)

    def scale(self, v: Visit, s: Tensor, kept: int) -> float:
        """What brings q to 1 / kept on average where no path is left to divide by."""
        total = float(weights.score(v.step, *self.borrow(v), {v.step.parameter: s}, {}, 0).sum())
        return s.numel() / (kept * total) if total > 0 else 0.0

    @staticmethod
    def living(v: Visit, mask: Tensor, shape: torch.Size) -> Tensor:
        """`mask` without the weights of units that no path reaches or leaves, packed."""
        rows, columns = _live_units(v.g, v.step), _live_units(v.x, v.step)
        if v.step.transposed:
            rows, columns = columns, rows
        groups = v.step.groups
        kept = ops.unpack_mask(mask, shape).view(
            groups, rows.numel() // groups, columns.numel() // groups, -1
        )
        live = kept & rows.view(groups, -1, 1, 1) & columns.view(groups, 1, -1, 1)
        return ops.pack_mask(live.view(shape))


def _units(t: Tensor, step: Weight) -> int:
    """The dimension that holds the units of a map."""
    return t.dim() - 1 if step.kind == "linear" else 1


def _live_units(t: Tensor, step: Weight) -> Tensor:
    unit = _units(t, step)
    others = [d for d in range(t.dim()) if d != unit]
    return (t.sum(others) if others else t) > 0


def _filled(t: Tensor, dense: Tensor, step: Weight) -> Tensor:
    live = _live_units(t, step)
    if bool(live.all()):
        return t
    shape = [1] * t.dim()
    shape[_units(t, step)] = -1
    total = dense.double().sum()
    scale = float(t.double().sum() / total) if total > 0 else 0.0
    return torch.where(live.view(shape), t, dense * scale)
