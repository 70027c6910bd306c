"""Path graphs as node-path balancing sees them: incoming paths, and pools that are sums."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from paikern.errors import PaikernError
from paikern.ops.balanced_mask import KernelGrid
from paikern.pathgraph import Flow, PathGraph
from paikern.pathgraph.steps import Mean, Replay, Step, Weight
from paikern.scorers.npb_program import Floats


def incoming(step: Weight, x: Tensor, grid: KernelGrid, flow: Flow) -> Floats:
    """P_in `[groups, inputs]`, its maximum 1: the incoming map, summed over all but the inputs.

    Summed by NumPy, in float64 and in an order that no number of threads changes.
    """
    if step.kind == "linear":
        maps = x.reshape(-1, x.shape[-1]).T
    else:
        maps = x.movedim(-1 - len(step.stride), 0).flatten(1)
    paths: Floats = maps.cpu().numpy().sum(1, dtype=np.float64).reshape(grid.groups, grid.inputs)
    if not paths.max() > 0:
        why = flow.where_dead or " (the layers before it leave out the units that it reads)"
        raise PaikernError(
            f"npb: no path reaches {step.parameter}{why}; lower the sparsity, or take another seed"
        )
    found: Floats = paths / paths.max()
    return found


def sum_pools(graph: PathGraph) -> PathGraph:
    """Every mean over dimensions and every average pool times the size of its window."""
    return replace(graph, steps=tuple(_summed(step) for step in graph.steps))


def _summed(step: Step) -> Step:
    if isinstance(step, Mean) and step.average:
        return replace(step, average=False)
    if isinstance(step, Replay) and "avg_pool" in step.op:
        mean, size = step.fn, _window(step)

        def summed(x: Tensor) -> Tensor:
            return mean(x) * size

        return replace(step, fn=summed)
    return step


def _window(step: Replay) -> int:
    """How many values the middle output is a mean of."""
    y = step.fn(torch.zeros(step.in_shape))
    middle = torch.zeros(math.prod(y.shape))
    middle[sum(n // 2 * s for n, s in zip(y.shape, y.contiguous().stride(), strict=True))] = 1
    (reached,) = step.adjoint(middle.view(y.shape), None)
    return int((reached != 0).sum())
