"""Which units follow which: the walk graph of a network, derived from its `PathGraph`.

A path visits a unit of every layer it passes: a channel of a convolution, an output of a linear
layer. Between two weights run steps without weights (reshapes, slices, pools, concatenations), and
what they do to units is found by running them on labels: every element of a value carries the
number of the unit that it belongs to, -1 where there is none. The steps then say by themselves
that a flattened map feeds `unit * m + position`, that a pixel shuffle spreads one channel, or that
a concatenation splits the range.

Nodes hold units: inputs, weight steps, and the places where paths meet (sums, gates, attention).
A slot is one input of a node. `pairs` of a slot lists which source unit meets which unit there:
an input channel of a weight, or a unit of a joint.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paikern.pathgraph.graph import PathGraph
from paikern.pathgraph.steps import (
    Add,
    Attention,
    Cat,
    MaxPool,
    Mean,
    Norm,
    Rectify,
    Replay,
    Scale,
    State,
    Step,
    Weight,
)

INPUT, WEIGHT, JOINT, OUTPUT = range(4)


@dataclass
class Slot:
    """One input of a node: source unit `sources[j]` (over all nodes) meets unit `meets[j]` there.

    Both int64 `[pairs]`, each pair once, ordered by `meets`, then `sources`. `onward` has the pairs
    of forward walks where they are others: in no network, but in a published program.
    """

    sources: Tensor
    meets: Tensor
    onward: Slot | None = None


@dataclass
class Node:
    """Units `base .. base + units - 1`; `step` for a weight; `width` units meet its slots."""

    kind: int
    base: int
    units: int
    width: int
    slots: list[Slot]
    step: Weight | None = None
    ancestors: frozenset[int] = frozenset()
    through_weights: frozenset[int] = frozenset()


@dataclass(frozen=True)
class WalkGraph:
    """Nodes in execution order, the last one being the output; see the module's description.

    dropped: how many identity skips were left out.
    """

    nodes: tuple[Node, ...]
    dropped: int

    @property
    def units(self) -> int:
        return self.nodes[-1].base + self.nodes[-1].units


def owners(nodes: Sequence[Node], labels: Tensor) -> list[int]:
    """Numbers of the nodes that the labelled units belong to, ascending."""
    found = []
    labels = labels[labels >= 0]
    while len(labels):
        number = bisect.bisect_right(nodes, int(labels.min()), key=lambda node: node.base) - 1
        found.append(number)
        labels = labels[labels >= nodes[number].base + nodes[number].units]
    return found


def walk_graph(graph: PathGraph, state: State, *, identity_skips: bool = False) -> WalkGraph:
    """The walk graph of `graph`.

    Units of an input are its channels where a convolution reads it, its features where a linear
    layer does. Those of a sum are the distinct combinations of units that meet in its elements
    (for ordinary networks its channels), those of attention the features of its heads.

    Args:
        graph: from `paikern.pathgraph.trace`.
        state: the model's tensors; read only for constant factors, which may hold zeros.
        identity_skips: False leaves out the inputs of sums that lead past the weights of another
            input of the same sum.

    Raises:
        NotImplementedError: a step mixes units (a mean over channels); names module and operation.
    """
    return Units(graph, state, identity_skips).build()


@dataclass
class Units:
    """Runs the steps of a graph on labels."""

    graph: PathGraph
    state: State
    identity_skips: bool
    nodes: list[Node] = field(default_factory=list)
    labels: dict[int, Tensor] = field(default_factory=dict)
    total: int = 0
    dropped: int = 0

    def build(self) -> WalkGraph:
        for value, shape in self.graph.inputs.items():
            self._input(value, shape)
        last = {value: at for at, step in enumerate(self.graph.steps) for value in step.inputs}
        last.update(dict.fromkeys(self.graph.outputs, len(self.graph.steps)))
        for at, step in enumerate(self.graph.steps):
            self.labels[step.output] = self._step(step, [self.labels[i] for i in step.inputs])
            for value in step.inputs:
                if last[value] == at:
                    self.labels.pop(value, None)
        ends = torch.cat([compact(self.labels[i]).flatten() for i in self.graph.outputs])
        sources = ends[ends >= 0].unique()
        units = torch.arange(len(sources))
        self._node(OUTPUT, len(units), len(units), [Slot(sources, units)])
        return WalkGraph(tuple(self.nodes), self.dropped)

    def _node(
        self, kind: int, units: int, width: int, slots: list[Slot], step: Weight | None = None
    ) -> int:
        """A new node; returns its number."""
        before = frozenset(o for slot in slots for o in owners(self.nodes, slot.sources))
        behind = before.union(*(self.nodes[o].ancestors for o in before))
        through = (
            behind
            if step is not None
            else frozenset().union(*(self.nodes[o].through_weights for o in before))
        )
        self.nodes.append(Node(kind, self.total, units, width, slots, step, behind, through))
        self.total += units
        return len(self.nodes) - 1

    def _new_labels(self, node: int, shape: Sequence[int], dim: int) -> Tensor:
        """The units of a node along `dim` of a value."""
        held = self.nodes[node]
        view = [1] * len(shape)
        view[dim] = held.units
        return (held.base + torch.arange(held.units)).view(view).expand(*shape)

    def _input(self, value: int, shape: tuple[int, ...]) -> None:
        reader = self._first_weight(value)
        if reader is not None and reader.kind == "linear" and len(shape) > 0:
            if reader.in_shape[-1] == shape[-1]:
                node = self._node(INPUT, shape[-1], 0, [])
                self.labels[value] = self._new_labels(node, shape, -1)
                return
            count = torch.Size(shape[1:]).numel()
            if reader.in_shape[-1] == count:  # flattened: every element is a feature
                base = self.nodes[self._node(INPUT, count, 0, [])].base
                every = base + torch.arange(count)
                self.labels[value] = every.view(1, *shape[1:]).expand(*shape)
                return
        dim = min(1, len(shape) - 1)
        self.labels[value] = self._new_labels(self._node(INPUT, shape[dim], 0, []), shape, dim)

    def _first_weight(self, value: int) -> Weight | None:
        """The first weight that reads `value`, other steps being passed."""
        seen = {value}
        for step in self.graph.steps:
            if seen.intersection(step.inputs):
                if isinstance(step, Weight):
                    return step
                seen.add(step.output)
        return None

    def _step(self, step: Step, xs: list[Tensor]) -> Tensor:
        if isinstance(step, Weight):
            return self._weight(step, xs[0])
        if isinstance(step, Add):
            return self._add(step, xs)
        if isinstance(step, Attention):
            return self._attention(step, xs)
        if isinstance(step, (Norm, Rectify)):
            return xs[0]
        if isinstance(step, Scale):
            return self._scale(step, xs[0])
        if isinstance(step, Cat):
            return _cat(step, xs)
        if isinstance(step, Mean):
            return _mean(step, xs[0])
        if isinstance(step, MaxPool):
            return self._max_pool(step, xs[0])
        if isinstance(step, Replay):
            return self._replayed(step, xs[0])
        return step.forward(xs)[0]  # shapes alone: reshape, permute, expand, slice

    def _weight(self, step: Weight, labels: Tensor) -> Tensor:
        dim = len(step.in_shape) - 1 if step.kind == "linear" else 1
        slot = met_units(labels.expand(*step.in_shape), dim)
        out_dim = len(step.out_shape) - 1 if step.kind == "linear" else 1
        node = self._node(WEIGHT, step.out_shape[out_dim], step.in_shape[dim], [slot], step)
        return self._new_labels(node, step.out_shape, out_dim)

    def _add(self, step: Add, xs: list[Tensor]) -> Tensor:
        parts = [x.expand(*step.out_shape) for x in xs]
        if not self.identity_skips and ("add" in step.op or "sub" in step.op):
            parts = self._without_skips(parts)
        if len(parts) == 1:
            return parts[0]
        parts = [p.expand(*_common(parts)) for p in (compact(p) for p in parts)]
        code = torch.zeros_like(parts[0])
        for part in parts:  # a number for every combination met
            code = (code * (self.total + 1) + part + 1).unique(return_inverse=True)[1]
        carries = torch.stack([part >= 0 for part in parts]).any(0)
        if not bool(carries.any()):
            return torch.full(step.out_shape, -1)
        met, unit = code[carries].unique(return_inverse=True)
        units = torch.arange(len(met))
        slots = []
        for part in parts:
            source = torch.full((len(met),), -1)
            source[unit] = part[carries]
            slots.append(Slot(source[source >= 0], units[source >= 0]))
        node = self._node(JOINT, len(met), len(met), slots)
        labels = torch.full(code.shape, -1)
        labels[carries] = self.nodes[node].base + unit
        return labels.expand(*step.out_shape)

    def _without_skips(self, parts: list[Tensor]) -> list[Tensor]:
        """The inputs of a sum but for those that another one reaches through weights."""
        owned = [frozenset(owners(self.nodes, compact(p))) for p in parts]
        through = [
            frozenset().union(*(self.nodes[o].through_weights for o in numbers))
            for numbers in owned
        ]
        kept = [
            part
            for at, part in enumerate(parts)
            if not owned[at]
            or not any(owned[at] <= passed for other, passed in enumerate(through) if other != at)
        ]
        self.dropped += len(parts) - len(kept)
        return kept

    def _attention(self, step: Attention, xs: list[Tensor]) -> Tensor:
        """Out unit (head, e): from v, and from q and k of its head.

        Where q and k are of another width than v, any of their features leads to any of the head.
        """
        *lead, _, width = step.out_shape
        heads = torch.Size(lead).numel()
        units = torch.arange(heads * width).view(*lead, 1, width)
        slots = []
        for x in xs:
            rows = compact(x)  # [..., T or 1, E]
            rows = step._repeat(rows)
            if rows.shape[-1] != width:
                sources = rows.unsqueeze(-1).expand(*rows.shape, width)
                meets = units.unsqueeze(-2)
            else:
                sources, meets = rows, units
            shape = torch.broadcast_shapes(sources.shape, meets.shape)
            slots.append(_pairs(sources.expand(shape), meets.expand(shape), heads * width))
        node = self._node(JOINT, heads * width, heads * width, slots)
        return (self.nodes[node].base + units).expand(*step.out_shape)

    def _scale(self, step: Scale, labels: Tensor) -> Tensor:
        labels = labels.expand(*step.out_shape)
        if step.learned:
            return labels
        closed = step.factor(self.state).detach().to("cpu") == 0
        return torch.where(closed, -1, labels) if bool(closed.any()) else labels

    def _max_pool(self, step: MaxPool, labels: Tensor) -> Tensor:
        flat = compact(labels.expand(*step.in_shape))
        if all(n == 1 for n in flat.shape[-step.spatial :]):  # one unit over the whole map
            return flat.expand(*step.out_shape)
        return self._replayed(step, labels)

    def _replayed(self, step: Step, labels: Tensor) -> Tensor:
        """Labels through an operation that is known only by what it returns.

        Numbers are sent in place of labels and divided by the response to ones; what comes out is
        the number of a unit unless units were mixed. A maximum betrays a mixture by the numbers
        in reverse order, a mean by random ones.
        """
        carries = labels >= 0
        at = labels.clamp(min=0)
        draw = torch.rand(self.total, generator=torch.Generator().manual_seed(0)).double() + 1
        up = torch.arange(1, self.total + 1).double()

        def through(numbers: Tensor) -> Tensor:
            sent = torch.where(carries, numbers[at], torch.zeros((), dtype=torch.float64))
            return step.forward([sent])[0]

        ones = through(torch.ones(self.total, dtype=torch.float64))
        open_ = ones != 0
        share = torch.where(open_, ones, 1.0)
        found = (through(up) / share).round().long().clamp(1, self.total) - 1
        for numbers in (up, up.flip(0), draw):
            wrong = open_ & (
                (through(numbers) / share - numbers[found]).abs() > 1e-6 * numbers[found]
            )
            if bool(wrong.any()):
                raise _mixed(step)
        return torch.where(open_, found, -1)


def met_units(labels: Tensor, dim: int) -> Slot:
    """Which units meet which index of dimension `dim`."""
    width = labels.shape[dim]
    flat = compact(labels)
    meets = torch.arange(width).view([-1 if d == dim else 1 for d in range(flat.dim())])
    shape = list(flat.shape)
    shape[dim] = width
    return _pairs(flat.expand(shape), meets.expand(shape), width)


def _pairs(sources: Tensor, meets: Tensor, width: int) -> Slot:
    sources, meets = sources.flatten(), meets.flatten()
    held = sources >= 0
    sources, meets = sources[held], meets[held]
    if not len(sources):
        return Slot(sources, meets)
    low = int(sources.min())
    span = int(sources.max()) - low + 1
    code = meets * span + (sources - low)
    if width * span <= 16 * len(code):  # 3 ms instead of 30 for the tokens of a ViT
        seen = torch.zeros(width * span, dtype=torch.bool)
        seen[code] = True
        code = seen.nonzero().flatten()
    else:
        code = code.unique()
    return Slot(code % span + low, code // span)


def compact(labels: Tensor) -> Tensor:
    """Dimensions along which a view repeats itself, cut to one."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _common(parts: Sequence[Tensor]) -> torch.Size:
    return torch.broadcast_shapes(*(compact(p).shape for p in parts))


def _cat(step: Cat, xs: list[Tensor]) -> Tensor:
    given = iter(xs)
    none = torch.full((1,) * len(step.in_shapes[0]), -1)
    parts = [
        compact(next(given).expand(*shape)) if carries else none
        for carries, shape in zip(step.carries, step.in_shapes, strict=True)
    ]
    around = list(torch.broadcast_shapes(*(p.select(step.dim, 0).shape for p in parts)))
    whole = []
    for part, shape in zip(parts, step.in_shapes, strict=True):
        size = [*around[: step.dim], shape[step.dim], *around[step.dim :]]
        whole.append(part.expand(size))
    joined = torch.cat(whole, step.dim)
    out = list(step.in_shapes[0])
    out[step.dim] = joined.shape[step.dim]
    return joined.expand(out)


def _mean(step: Mean, labels: Tensor) -> Tensor:
    labels = labels.expand(*step.in_shape)
    for dim in step.dims:  # a repeated dimension has one unit
        if labels.shape[dim] > 1 and labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, 1)
    top = labels.amax(step.dims, keepdim=True)
    if bool(((labels != top) & (labels >= 0)).any()):
        raise _mixed(step)
    kept = [1 if d in step.dims else n for d, n in enumerate(step.in_shape)]
    if not any(labels.stride(d) == 0 and n > 1 for d, n in enumerate(labels.shape)):
        return top.reshape(step.out_shape)
    flat = compact(labels).amax(step.dims, keepdim=True)  # stays a view of its repetitions
    return flat.expand(kept).reshape(step.out_shape)


def _mixed(step: Step) -> NotImplementedError:
    return NotImplementedError(
        f"{step.where or 'the model'}: {step.op} mixes units of the layer before it, so that a "
        "walk has no single unit to go on from; leave this part out of the model or use a method "
        "without walks"
    )
