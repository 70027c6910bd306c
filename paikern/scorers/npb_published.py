"""NPB as its authors' program behaves: `variant="published"`.

The programs are the same and solved exactly; what differs is around them.

- Large layers are taken apart into pieces of outputs, with a program each for the layer's density
  and all incoming paths. Outputs that fill no whole piece are left dense.
- All parameters are 1, biases too: they begin paths of their own, and an output without live inputs
  is still 1. Norms are the identity.
- Where the budget is less than one whole input, `longest` is the sum over all inputs.
- 1x1 shortcuts take beta = 0.001 and no `max_kernel`. Caps of `node_constraint` are rounded down,
  so that the budget may not be used up.
- Budgets are rounded up (`npb` of `paikern.budget`), and the fine-tuning pass may overshoot.

Not followed: random positions without a seed (here they come from `seed`), and incoming paths read
from the wrong module before the pools of VGG. Mean pools are means, as where the program calls the
functional form, or sums with `pool="sum"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from paikern import ops
from paikern.analysis import shortcuts
from paikern.ops.balanced_mask import KernelGrid
from paikern.pathgraph import Flow, PathGraph, Semantics, Visit, weights
from paikern.pathgraph.flow import device_of
from paikern.pathgraph.steps import Add, Weight
from paikern.scorers.base import Report, Run
from paikern.scorers.npb_graph import incoming, sum_pools
from paikern.scorers.npb_program import Floats, LayerProgram, Solution

if TYPE_CHECKING:
    from paikern.scorers.npb import NPB

_CHUNK, _LINEAR_CHUNK = 32, 10
_SHORTCUT_BETA = 0.001


@dataclass
class Published:
    """One run; `build` returns the masks."""

    method: NPB
    run: Run
    counts: Mapping[str, int]
    report: Report
    masks: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.run.graph
        self.shortcuts = shortcuts(graph)
        self.chunk_above = _chunk_above(graph)
        self.state = {
            name: torch.ones_like(t) if t.dim() < 2 else t for name, t in self.run.state.items()
        }
        graph = graph if self.method.pool == "as_is" else sum_pools(graph)
        self.flow = Flow(graph, Semantics(power=0, offsets=True))

    def build(self) -> dict[str, Tensor]:
        def arrive(step: Weight, x: Tensor) -> None:
            name = step.parameter
            if name in self.counts and name not in self.masks:
                self.masks[name] = self._layer(step, x).to(x.device)

        self.flow.forward(self.state, self.masks, arrive=arrive)
        for name in self.counts:
            if name not in self.masks:
                device = device_of(self.run.state)
                ones = torch.ones(self.run.shapes[name], dtype=torch.bool, device=device)
                self.masks[name] = ops.pack_mask(ones)
                self.run.notes.append(f"npb: {name}, which no path uses, is left dense")
        if self.method.repair:
            _FineTune(self).run()
        return {name: self.masks[name] for name in self.run.layers}

    def effective(self) -> dict[str, Tensor]:
        """Packed bits of the kept weights that a path leads through."""
        found = {name: torch.zeros_like(bits) for name, bits in self.masks.items()}

        def visit(v: Visit) -> None:
            name, rows = v.step.parameter, v.step.rows
            if name not in found:
                return
            q = weights.score(v.step, v.x, v.g, self.state, self.masks, 0) > 0
            if rows is not None:
                whole = torch.zeros(self.run.shapes[name], dtype=torch.bool, device=q.device)
                whole[rows[0] : rows[1]] = q.reshape(whole[rows[0] : rows[1]].shape)
                q = whole
            found[name] |= ops.pack_mask(q)

        self.flow.forward(self.state, self.masks)
        self.flow.backward(visit)
        return found

    def _layer(self, step: Weight, x: Tensor) -> Tensor:
        name, budget = step.parameter, self.counts[step.parameter]
        layer = self.method.layer(step, self.run.shapes[name], budget)
        grid, outputs_at = layer.grid, 1 if layer.transposed else 0
        paths = incoming(step, x, grid, self.flow)
        size = self._chunk(grid, step)
        mask = torch.ones(layer.shape, dtype=torch.bool, device=device_of(self.run.state))
        numel, solved = mask.numel(), []
        for number in range(grid.outputs // size):
            part = list(layer.shape)
            part[outputs_at] = size * (grid.groups if outputs_at == 0 else 1)
            share = -(-budget * size // grid.outputs)
            piece = replace(layer, shape=tuple(part), grid=grid._replace(outputs=size))
            solved.append(self._solve(name, piece.grid, paths, share, budget / numel))
            bits = self.method.mask(self.run, name, piece, solved[-1].rows, number)
            at = mask.narrow(outputs_at, number * size if grid.groups == 1 else 0, part[outputs_at])
            at.copy_(ops.unpack_mask(bits, part))
        self.report(len(self.masks) + 1, solved[-1].summary())
        return ops.pack_mask(mask)

    def _chunk(self, grid: KernelGrid, step: Weight) -> int:
        """Outputs of a piece; grouped convolutions stay whole."""
        size = grid.outputs
        if grid.groups == 1 and step.kind == "linear":
            size = _LINEAR_CHUNK if grid.inputs * grid.outputs > 5120 else size
        elif grid.groups == 1 and grid.inputs * grid.outputs > self.chunk_above:
            size = _CHUNK
        return min(size, grid.outputs)

    def _solve(
        self, name: str, grid: KernelGrid, paths: Floats, budget: int, density: float
    ) -> Solution:
        groups, inputs, outputs, positions = grid
        shares = np.full(groups, -(-budget // groups))
        needed = -(-shares // (inputs * outputs))
        shortcut = name in self.shortcuts
        given = self.method.max_kernel
        most = given.get(name) if isinstance(given, Mapping) else given
        most = positions if shortcut or most is None else min(most, positions)

        def cap(units: int) -> np.ndarray:
            return np.full(groups, int(units * positions * density))

        bounded = self.method.node_constraint
        return LayerProgram(
            np.where(paths.max(1, keepdims=True) > 0, paths, 1.0),
            outputs,
            shares,
            np.maximum(most, needed),
            np.minimum(self.method.min_node or 1, needed),
            self.method.alpha,
            _SHORTCUT_BETA if shortcut else self.method.beta if positions > 1 else 0.0,
            cap(outputs) if bounded else None,
            cap(inputs) if bounded else None,
            published_longest=True,
        ).solve()


def _chunk_above(graph: PathGraph) -> int:
    """Kernels from which a layer is taken apart: fewer in residual networks on small images."""
    small = all(max(shape[2:], default=33) <= 32 for shape in graph.inputs.values())
    return 64 * 32 if small and any(isinstance(s, Add) for s in graph.steps) else 128 * 128


@dataclass
class _FineTune:
    """Convolutions in order: what is not effective is filled in, whole kernels at a time."""

    owner: Published

    def run(self) -> None:
        carry, owner = 0, self.owner
        effective = owner.effective()
        convs = {step.parameter for step in owner.run.graph.weights if step.kind == "conv"}
        for name in (name for name in owner.run.layers if name in convs):
            shape = owner.run.shapes[name]
            kept = ops.unpack_mask(effective[name], shape)
            wanted = int(ops.unpack_mask(owner.masks[name], shape).sum()) + carry
            missing = wanted - int(kept.sum())
            if missing <= 1:
                continue
            filled = self._filled(name, kept, missing)
            owner.masks[name] = ops.pack_mask(filled)
            effective = owner.effective()
            owner.masks[name] = effective[name]
            carry = max(wanted - int(ops.unpack_mask(effective[name], shape).sum()), 0)

    def _filled(self, name: str, kept: Tensor, missing: int) -> Tensor:
        """Kernels, or input columns of a shortcut, dense in the order of what they hold."""
        columns = name in self.owner.shortcuts
        held = kept.flatten(2).sum(2)  # [O, I]
        held = held.sum(0) if columns else held.flatten()
        gain = kept.numel() // held.numel() - held
        order = torch.sort(held, descending=True, stable=True).indices
        before = gain[order].cumsum(0) - gain[order]
        dense = torch.zeros_like(held, dtype=torch.bool)
        dense[order[before < missing]] = True
        if columns:
            return kept | dense.view(1, -1, *(1,) * (kept.dim() - 2))
        return kept | dense.view(*kept.shape[:2], *(1,) * (kept.dim() - 2))
