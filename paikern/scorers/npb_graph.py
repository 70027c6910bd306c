"""Path graphs as node-path balancing sees them: pools that add up instead of taking a mean."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from paikern.pathgraph import PathGraph
from paikern.pathgraph.steps import Mean, Replay, Step


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
