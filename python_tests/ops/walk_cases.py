"""Networks as walks see them, and random ones: what the tests of all backends draw from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paikern import ops
from paikern.pathgraph import trace
from paikern.pathgraph.units import walk_graph
from paikern.pathgraph.walks import Walks, flattened
from python_tests.pathgraph.helpers import state_of


def walks_of(net: nn.Module, x: Tensor, *, skips: bool = False, whole: bool = False) -> Walks:
    state = state_of(net)
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters() if p.dim() > 1}
    graph = walk_graph(trace(net, x), state, identity_skips=skips)
    return flattened(graph, state, shapes, whole=whole)


def tables_of(w: Walks, weighting: str = "abs") -> Tensor:
    return ops.phew_tables(w.weights, w.geometry, w.table_size, weighting=weighting)


def drawn(w: Walks, tables: Tensor, **options: Any) -> Tensor:
    options = {"seed": 5, "first": 0, "count": 60, "width": w.width, **options}
    return ops.phew_walks(w.weights, tables, w.geometry, w.graph, **options)


class RandomNet(nn.Module):
    """Linear layers over random earlier values, whose sums and concatenations come up as well."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = np.random.default_rng(seed)
        widths, self.plan = [int(draw.integers(1, 9))], []
        self.inputs = widths[0]
        self.layers = nn.ModuleList()
        for _ in range(int(draw.integers(1, 7))):
            kind = draw.choice(["linear", "linear", "add", "cat", "part"])
            a, b = (int(n) for n in draw.integers(0, len(widths), 2))
            if kind == "linear" or (kind == "add" and widths[a] != widths[b]):
                out = widths[b] if draw.random() < 0.5 else int(draw.integers(1, 30))
                self.plan.append(("linear", a, len(self.layers)))
                self.layers.append(nn.Linear(widths[a], out, bias=False))
                widths.append(out)
            elif kind == "part":
                self.plan.append((kind, a, b))
                widths.append((widths[a] + 1) // 2)
            else:
                self.plan.append((kind, a, b))
                widths.append(widths[a] if kind == "add" else widths[a] + widths[b])
        self.head = nn.Linear(widths[-1], int(draw.integers(1, 6)), bias=False)
        with torch.no_grad():
            for p in self.parameters():
                values = draw.standard_normal(p.shape) * 2.0 ** draw.integers(-20, 20, p.shape)
                values[draw.random(p.shape) < draw.choice([0.0, 0.3, 0.8])] = 0
                p.copy_(torch.from_numpy(values))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, a, b in self.plan:
            if kind == "linear":
                values.append(self.layers[b](values[a]))
            elif kind == "part":
                values.append(values[a][:, ::2])
            elif kind == "add":
                values.append(values[a] + values[b])
            else:
                values.append(torch.cat([values[a], values[b]], 1))
        y: Tensor = self.head(values[-1])
        return y
