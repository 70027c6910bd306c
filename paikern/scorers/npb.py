"""NPB: node-path balancing, a small integer program for every layer.

Source: Pham et al., "Towards Data-Agnostic Pruning At Initialization: What Makes a Good Sparse
Mask?", NeurIPS 2023. Weights are replaced by their masks, norms are the identity, biases dropped,
the input is ones. Layers are taken in the order of the network; P_in[i], the paths that enter a
layer by its input i, follows from the masks before it, so one sweep builds all of them.
`npb_program.py` states the program of a layer and why sorting solves it. The weights that an input
keeps are spread evenly over the outputs, and their positions in a kernel drawn at random
(`ops.balanced_mask`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from paikern import ops
from paikern.errors import SparsityError
from paikern.ops.balanced_mask import KernelGrid
from paikern.pathgraph import Flow, Semantics
from paikern.pathgraph.flow import device_of
from paikern.pathgraph.steps import Weight
from paikern.prunable import Prunable
from paikern.scorers.base import MaskBuilder, Report, Run, register_scorer
from paikern.scorers.npb_graph import incoming, sum_pools
from paikern.scorers.npb_program import Counts, Floats, LayerProgram, Solution
from paikern.scorers.npb_published import Published
from paikern.scorers.npb_repair import Placed, move_dead_weights

OUTPUTS = ("even", "few")
PLACES = ("random", "score")
POOLS = ("as_is", "sum")


@register_scorer("npb")
class NPB(MaskBuilder):
    """Solves the node-path program of every layer and builds its mask.

    Args:
        alpha: weight of nodes against paths, in [0, 1].
        beta: weight of kernels with at least one weight, >= 0.
        max_kernel: at most so many weights a kernel, or parameter name -> number; all by default.
            Raised where the budget of a layer needs more.
        min_node: weights from which an input or output counts as covered; 1 by default, and never
            more than the budget of a layer gives each kernel on average, rounded up.
        node_constraint: no input and no output gets more than its even share of the budget.
        outputs: of the many optima take the one with "even" outputs, or with "few" that get all
            there is beyond `min_node` for each. Those then carry most paths, and later layers
            leave fewer inputs out.
        place: "random", or "score": the largest |w| of a kernel, ties to the lower index.
        pool: "as_is" takes mean pools as means, "sum" as sums. It matters only where branches with
            and without a pool meet.
        repair: weights that end on no path are moved to places that are on one.
    """

    alpha: float = 0.01
    beta: float = 1.0
    max_kernel: int | Mapping[str, int] | None = None
    min_node: int | None = None
    node_constraint: bool = False
    outputs: str = "even"
    place: str = "random"
    pool: str = "as_is"
    repair: bool = True

    summary = "node-path balancing: an exact integer program for every layer"
    source = "Pham et al. 2023 (NeurIPS)"
    cost = "1 sweep of one input"
    weakness = "ranks nothing by the weights; below one weight a node it gives nodes up"
    needs_inputs: ClassVar[bool] = True
    default_scope: ClassVar[str] = "erk"
    reads_weights: ClassVar[bool] = False
    variants: ClassVar[tuple[str, ...]] = ("paper", "published")
    published_budget: ClassVar[str] = "npb"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta must be >= 0 and finite, got {self.beta}")
        given = self.max_kernel
        most = dict(given) if isinstance(given, Mapping) else {"": given}
        for name, value in (*((f"max_kernel {n}".strip(), v) for n, v in most.items()),
                            ("min_node", self.min_node)):  # fmt: skip
            whole = isinstance(value, Integral) and not isinstance(value, bool)
            if value is not None and (not whole or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name, choices in (("outputs", OUTPUTS), ("place", PLACES), ("pool", POOLS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("node_constraint", "repair"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

        if self.node_constraint and self.outputs == "few":
            raise ValueError("outputs='few': node_constraint=True makes them even; use one of both")

    def build(
        self, run: Run, kept: int | list[int], report: Report = lambda done, values: None
    ) -> dict[str, Tensor]:
        """The masks, in one sweep; `report` gets each layer's objective and an upper bound."""
        counts = self._budgets(run, kept)
        if run.variant == "published":
            return Published(self, run, counts, report).build()
        graph = run.graph if self.pool == "as_is" else sum_pools(run.graph)
        flow = run.flow(Semantics(power=0)) if graph is run.graph else Flow(graph, Semantics(0))
        masks: dict[str, Tensor] = {}
        placed: dict[str, Placed] = {}

        def build(layer: Placed, name: str, paths: Floats) -> Tensor:
            solved = self.solve(layer, paths, counts[name])
            mask = self.mask(run, name, layer, solved.rows)
            report(len(placed), solved.summary())
            return mask

        def arrive(step: Weight, x: Tensor) -> None:
            name = step.parameter
            if name in counts and name not in masks:
                layer = placed[name] = self.layer(step, run.shapes[name], counts[name])
                masks[name] = build(layer, name, incoming(step, x, layer.grid, flow)).to(x.device)

        flow.forward(run.state, masks, arrive=arrive)
        for name in (name for name in counts if name not in masks):
            run.notes.append(f"npb: the inputs of {name}, which no path uses, were taken as equal")
            placed[name] = layer = self.layer(run.layers[name], run.shapes[name], counts[name])
            equal = np.ones((layer.grid.groups, layer.grid.inputs))
            masks[name] = build(layer, name, equal).to(device_of(run.state))
        if self.repair:
            move_dead_weights(run, flow, masks, placed)
        return {name: masks[name] for name in run.layers}

    def _budgets(self, run: Run, kept: int | list[int]) -> dict[str, int]:
        if isinstance(kept, int):
            raise ValueError("scope: npb needs a budget in every layer; use 'erk' or 'local'")
        counts = dict(zip(run.layers, kept, strict=True))
        if empty := [name for name, count in counts.items() if count < 1]:
            raise SparsityError(f"npb: {empty[0]} has a budget of 0 weights; lower the sparsity")
        if isinstance(self.max_kernel, Mapping):
            for name in self.max_kernel:
                if name not in counts:
                    raise ValueError(f"max_kernel: no layer {name!r} is pruned")
        return counts

    def layer(self, use: Weight | Prunable, shape: tuple[int, ...], budget: int) -> Placed:
        """How a step uses the parameter: a linear one by a kernel has an input for each tap."""
        if isinstance(use, Prunable):
            transposed = use.layout.transposed
        else:
            transposed = use.transposed
            shape = shape if use.kind == "conv" else (shape[0], math.prod(shape[1:]))
        grid = KernelGrid.of(shape, groups=use.groups, transposed=transposed)
        most = self.max_kernel
        if isinstance(most, Mapping):
            most = most.get(use.name if isinstance(use, Prunable) else use.parameter)
        share = -(-budget // grid.groups)  # of the groups that get most
        needed = -(-share // (grid.inputs * grid.outputs))
        capacity = max(min(most or grid.positions, grid.positions), needed)
        return Placed(shape, grid, transposed, capacity, min(self.min_node or 1, needed))

    def solve(self, layer: Placed, paths: Floats, budget: int) -> Solution:
        """The program of a layer; its groups share the budget evenly.

        What cannot be shared goes to the groups that most paths enter, then to the first.
        """
        groups, inputs, outputs, _ = layer.grid
        shares = np.full(groups, budget // groups)
        shares[np.argsort(-paths.sum(1), kind="stable")[: budget % groups]] += 1
        rows = np.zeros((groups, inputs), np.int64)
        value, bound = np.zeros(groups), np.zeros(groups)
        some = shares > 0
        given, incoming = shares[some], paths[some]
        found = LayerProgram(
            # A group that no path enters: its inputs are alike.
            np.where(incoming.max(1, keepdims=True) > 0, incoming, 1.0),
            outputs,
            given,
            np.full(len(given), layer.capacity),
            np.minimum(self.min_node or 1, -(-given // (inputs * outputs))),
            self.alpha,
            self.beta,
            -(-given // inputs) if self.node_constraint else None,
            -(-given // outputs) if self.node_constraint else None,
        ).solve()
        rows[some], value[some], bound[some] = found.rows, found.value, found.bound
        return Solution(rows, value, bound)

    def mask(self, run: Run, name: str, layer: Placed, rows: Counts, piece: int = 0) -> Tensor:
        """The packed mask with these row sums, on the CPU, of a layer or a piece of its outputs."""
        weight = None
        if self.place == "score":
            weight = run.weight(name)
            if weight.is_meta:
                raise ValueError(
                    f"place='score': {name} is on the meta device and holds no values; "
                    "load the weights first"
                )
            if math.prod(layer.shape) < weight.numel():
                along, size = (1, layer.shape[1]) if layer.transposed else (0, layer.shape[0])
                weight = weight.narrow(along, piece * size, size)
            weight = weight.reshape(layer.shape)
        return ops.balanced_mask(
            torch.from_numpy(rows.reshape(-1)).to(device_of(run.state)),
            layer.shape,
            groups=layer.grid.groups,
            transposed=layer.transposed,
            cover=layer.least if self.outputs == "few" else None,
            seed=run.seed,
            stream=list(run.layers).index(name) + len(run.layers) * piece,
            scores=weight,
            name=name,
        )
