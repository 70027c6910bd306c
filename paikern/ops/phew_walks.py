"""phew_walks: random walks biased by the magnitude of weights, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.ops._library import define, fake, run
from paikern.ops.phew_tables import check_walk_weights, which

define(
    "phew_walks(Tensor[] weights, Tensor tables, Tensor geometry, Tensor[] graph, int seed, "
    "int first, int count, int width, int weighting, bool whole) -> Tensor"
)


@fake("phew_walks")
def _shape(
    weights: Sequence[Tensor],
    tables: Tensor,
    geometry: Tensor,
    graph: Sequence[Tensor],
    seed: int,
    first: int,
    count: int,
    width: int,
    weighting: int,
    whole: bool,
) -> Tensor:
    return geometry.new_empty((count, width), dtype=torch.int64)


def phew_walks(
    weights: Sequence[Tensor],
    tables: Tensor,
    geometry: Tensor,
    graph: Sequence[Tensor],
    *,
    seed: int,
    first: int,
    count: int,
    width: int,
    weighting: str = "abs",
    whole: bool = False,
) -> Tensor:
    """Walks `first` to `first + count - 1`, one a row: the bits they pass, then -1.

    Walk t goes forwards if t is even, from input unit `t / 2`, else backwards from output unit
    `(t - 1) / 2`, both modulo their number. Before a weight it draws the unit on the other side by
    kernel norm, then the element by its share of the norm. Between weights it chooses uniformly
    among the slots that take its unit, then among the units met there. A row or column of
    zeros, and a kernel of zeros, is drawn from uniformly. The row of a walk that meets a unit
    without successor is empty.

    Hop h of walk t draws Philox4x32-10 of the counter `(t, h)` under the key `seed`: any walk can
    be had without the others, and no thread or batch changes it.

    Args:
        weights, geometry, weighting: as in `phew_tables`, which made `tables`.
        graph: nodes, slots, links, index, owner, starts of `paikern.pathgraph.walks.Walks`.
        seed: any integer; taken modulo 2**64.
        width: columns of the result, at least the bits of the longest walk.
        whole: pass all elements of a kernel, in order, instead of one.

    Returns:
        int64 `[count, width]`.

    Raises:
        ValueError: arguments that do not fit each other.

    Source: specification of PHEW, sections 2 to 4.

    Example:
        >>> import torch, paikern as pk
        >>> from paikern.pathgraph import trace, walks
        >>> from paikern.pathgraph.units import walk_graph
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[1.0, 3.0], [0.0, 1.0]]))
        >>> state = dict(net.named_parameters())
        >>> graph = walk_graph(trace(net, torch.ones(1, 2)), state)
        >>> w = walks.flattened(graph, state, {"weight": (2, 2)})
        >>> tables = pk.ops.phew_tables(w.weights, w.geometry, w.table_size)
        >>> args = (w.weights, tables, w.geometry, w.graph)
        >>> pk.ops.phew_walks(*args, seed=0, first=0, count=4, width=w.width).flatten().tolist()
        [0, 1, 1, 3]
    """
    check_walk_weights("phew_walks", weights, geometry, tables.numel())
    kinds = [t.dtype for t in (tables, *graph)]
    if kinds != [torch.float32] + 3 * [torch.int64] + 3 * [torch.int32] or len(graph) != 6:
        raise ValueError("phew_walks: tables and graph must be those of phew_tables and Walks")
    if first < 0 or count < 0 or width < 1:
        raise ValueError(
            f"phew_walks: first={first}, count={count}, width={width} must be 0, 0, 1 or more"
        )
    signed = (seed + 2**63) % 2**64 - 2**63
    found: Tensor = run(
        "phew_walks", [*weights, tables, geometry, *graph], list(weights), tables, geometry,
        list(graph), signed, first, count, width, which(weighting), whole,
    )  # fmt: skip
    return found
