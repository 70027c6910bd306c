"""Which channels of a network can be removed, and what goes with each of them.

A channel is an output of a weight: of a convolution, of a linear layer. Removing it takes away its
rows of that weight and the columns of every weight that reads it. Where the graph adds two values,
multiplies them, or filters each channel by itself, the channels that meet are one and go together.
Which those are is found by running the steps of the graph on labels, as `units` does for walks,
and joining the labels that meet; nothing about any architecture is built in.

What cannot become narrower keeps all of its channels, and with it everything coupled to it: the
outputs of the model, values that a norm mixes over their channels (LayerNorm, GroupNorm), heads of
attention, channels that a reshape or a slice takes apart, weights that are used twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
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
    Replay,
    Reshape,
    Scale,
    Slice,
    State,
    Step,
    Weight,
)
from paikern.pathgraph.units import Units, compact, met_units

_FIXED = 0  # the unit of everything that is no channel of a weight: inputs, slices, heads
_PER_CHANNEL = ("aten.batch_norm", "aten.instance_norm", "aten.prelu")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels `0 .. size - 1` of layers that are coupled, so that they keep the same ones.

    name: of the first layer, in order of execution.
    rows: weight -> int64 `[out]`, the channel that each of its outputs belongs to.
    columns: weight -> int64 `[in]`, the channel that each of its inputs reads, -1 for any other.
    norms: path of a batch norm (or PReLU) -> int64 `[n]`, the channel of each of its entries, -1
        for any other.
    """

    name: str
    size: int
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    norms: dict[str, Tensor]

    @property
    def nodes(self) -> Tensor:
        """How many outputs of weights each channel stands for, int64 `[size]`."""
        return torch.stack([rows.bincount(minlength=self.size) for rows in self.rows.values()]).sum(
            0
        )


@dataclass(frozen=True)
class ChannelGroups:
    """The groups in order of execution; `kept_whole` has the other layers, each with the reason."""

    groups: tuple[ChannelGroup, ...]
    kept_whole: dict[str, str]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def nodes(self) -> int:
        """How many outputs of weights can be removed or kept."""
        return sum(len(rows) for group in self.groups for rows in group.rows.values())


def channel_groups(graph: PathGraph, state: State, prunable: Collection[str]) -> ChannelGroups:
    """The channels of `graph` that can be removed.

    Args:
        graph: from `paikern.pathgraph.trace`.
        state: the model's tensors; read only for constant factors, which may hold zeros.
        prunable: the weights that may be changed; whatever touches another one is kept whole.

    Channels are numbered in the order of the outputs of the group's first layer. A convolution with
    groups keeps as many channels in each: those at the same place of every group are one. Where it
    filters each channel by itself, input and output are one.

    Example:
        >>> import torch
        >>> from paikern.pathgraph import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> found = channel_groups(trace(net, torch.ones(1, 3)), {}, ["0.weight", "2.weight"])
        >>> [(group.name, group.size) for group in found], found.kept_whole
        ([('0', 4)], {'2.weight': 'its outputs are those of the model'})
    """
    return _Builder(graph, state, True, prunable=frozenset(prunable)).groups()


@dataclass
class _Layer:
    """A weight step: outputs `base .. base + out - 1`, and the unit that each input reads."""

    step: Weight
    base: int
    out: int
    reads: Tensor


@dataclass
class _Builder(Units):
    prunable: frozenset[str] = frozenset()
    layers: list[_Layer] = field(default_factory=list)
    norms: list[tuple[str, Tensor]] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    fixed: list[tuple[Tensor, str]] = field(default_factory=list)

    def groups(self) -> ChannelGroups:
        self._number(1)
        steps = self.graph.recorded or self.graph.steps
        self.uses = Counter(s.parameter for s in steps if isinstance(s, Weight))
        self.alive = {step.output for step in self.graph.steps}
        for value, shape in self.graph.inputs.items():
            self.labels[value] = _all_fixed(shape)
        last = {value: at for at, step in enumerate(steps) for value in step.inputs}
        last.update(dict.fromkeys(self.graph.outputs, len(steps)))
        for at, step in enumerate(steps):
            self.labels[step.output] = self._step(step, [self.labels[i] for i in step.inputs])
            for value in step.inputs:
                if last[value] == at:
                    self.labels.pop(value, None)
        for value in self.graph.outputs:
            self._keep(self.labels[value], "its outputs are those of the model")
        return self._collected()

    # --- labels ----------------------------------------------------------------------------------

    def _number(self, count: int) -> int:
        """New units; returns the first."""
        base = self.total
        self.total += count
        self.parent += range(base, self.total)
        return base

    def _keep(self, labels: Tensor, reason: str) -> None:
        units = compact(labels).flatten().unique()
        self.fixed.append((units[units > _FIXED], reason))

    def _fixed(self, labels: Tensor, shape: Sequence[int], reason: str) -> Tensor:
        """A result that cannot become narrower, so that its source cannot either."""
        self._keep(labels, reason)
        return _all_fixed(shape)

    def _step(self, step: Step, xs: list[Tensor]) -> Tensor:
        x, place = xs[0], step.where or "the model"
        if isinstance(step, Attention):
            for value in xs:
                self._keep(value, f"the heads of attention in {place} read it")
            return _all_fixed(step.out_shape)
        if isinstance(step, Norm):
            return self._norm(step, x)
        if isinstance(step, Reshape) and _takes_apart(step, x):
            return self._fixed(x, step.out_shape, f"{step.op} in {place} takes its channels apart")
        if isinstance(step, Slice) and step.dim in _varying(x):
            return self._fixed(x, step.out_shape, f"{step.op} in {place} takes a part of it")
        if isinstance(step, Mean) and set(step.dims) & set(_varying(x.expand(*step.in_shape))):
            return self._fixed(x, step.out_shape, f"{step.op} in {place} mixes its channels")
        if isinstance(step, Scale) and not _is_plain(step, x):
            reason = f"{place} multiplies each of its channels by a number of its own"
            return self._fixed(x, step.out_shape, reason)
        if isinstance(step, Cat):
            return self._cat(step, xs)
        if isinstance(step, (Replay, MaxPool)):
            return self._in_place(step, x)
        return super()._step(step, xs)

    def _weight(self, step: Weight, labels: Tensor) -> Tensor:
        linear = step.kind == "linear"
        dim = len(step.in_shape) - 1 if linear else 1
        out_dim = len(step.out_shape) - 1 if linear else 1
        labels = labels.expand(*step.in_shape)
        slot = met_units(labels, dim)
        reads = torch.full((step.in_shape[dim],), -1)
        reads[slot.meets] = slot.sources  # the others that meet it are joined to this one
        self._join(slot.sources, reads[slot.meets], "another value")
        out = step.out_shape[out_dim]
        base = self._number(out)
        rows = torch.arange(base, self.total)
        self.layers.append(_Layer(step, base, out, reads))
        if (reason := self._held(step)) is not None:
            self._keep(labels, f"{step.parameter}, which reads it, {reason}")
            self._keep(rows, f"it {reason}")
        elif step.groups > 1:
            self._grouped(step, reads, rows)
        shape = [out if d == out_dim else 1 for d in range(len(step.out_shape))]
        return rows.view(shape).expand(*step.out_shape)

    def _held(self, step: Weight) -> str | None:
        """Why a weight stays as it is."""
        if step.parameter not in self.prunable:
            return "is left out of pruning"
        if self.uses[step.parameter] > 1:
            return "is used more than once"
        if step.rows is not None:
            return "is a part of a larger weight"
        if step.output not in self.alive:
            return "does not lead to the output"
        if step.kind == "linear" and len(step.kernel) > 0:
            return "is used as a matrix"
        return None

    def _grouped(self, step: Weight, reads: Tensor, rows: Tensor) -> None:
        """As many channels in every group: those at the same place are one."""
        groups = step.groups
        if len(reads) == groups:
            if len(rows) == groups:
                self._join(reads, rows, f"an input of {step.parameter}")
            else:
                reason = f"{step.parameter} makes several outputs of each input"
                self._keep(reads[reads >= 0], reason)
                self._keep(rows, reason)
            return
        for units in (reads, rows):
            places = units.view(groups, -1)
            first = places[:1].expand_as(places)
            self._join(places.flatten(), first.flatten(), f"another group of {step.parameter}")

    def _norm(self, step: Norm, labels: Tensor) -> Tensor:
        place = step.where or "the model"
        if step.op not in _PER_CHANNEL:
            self._keep(labels, f"{place} normalises over its channels")
        else:
            slot = met_units(labels, 1)
            entries = torch.full((labels.shape[1],), -1)
            entries[slot.meets] = slot.sources
            self._join(slot.sources, entries[slot.meets], "another value")
            self.norms.append((step.where, entries))
        return labels

    def _add(self, step: Add, xs: list[Tensor]) -> Tensor:
        result, shape = xs[0], step.in_shapes[0]
        for x, size in zip(xs[1:], step.in_shapes[1:], strict=True):
            result, shape = self._meet(result, shape, x, size, step.where or "the model")
        return result.expand(*step.out_shape)

    def _meet(
        self, u: Tensor, u_shape: tuple[int, ...], v: Tensor, v_shape: tuple[int, ...], place: str
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Two values added or multiplied element by element: what meets is joined.

        A value of one channel that meets all of another's stays, and the other is free.
        """
        rank = max(len(u_shape), len(v_shape))
        u, v = (x.reshape((1,) * (rank - x.dim()) + tuple(x.shape)) for x in (u, v))
        sizes = [(1,) * (rank - len(s)) + tuple(s) for s in (u_shape, v_shape)]
        shape = tuple(max(a, b) for a, b in zip(*sizes, strict=True))
        one_for_all = f"{place} combines it with all channels of another value"
        for x, size, other in ((u, sizes[0], v), (v, sizes[1], u)):
            if any(size[d] == 1 and shape[d] > 1 for d in _varying(other)):
                self._keep(x, one_for_all)
                return other.expand(shape), shape
        u, v = compact(u), compact(v)
        around = torch.broadcast_shapes(u.shape, v.shape)
        u, v = u.expand(around), v.expand(around)
        both = (u >= 0) & (v >= 0)
        pairs = torch.stack([u[both], v[both]]).unique(dim=1)
        self._join(pairs[0], pairs[1], f"a value in {place} that keeps its width")
        return torch.where(u >= 0, u, v).expand(shape), shape

    def _cat(self, step: Cat, xs: list[Tensor]) -> Tensor:
        out = list(step.in_shapes[0])
        out[step.dim] = sum(shape[step.dim] for shape in step.in_shapes)
        across = [d for x in xs for d in _varying(x) if d != step.dim]
        if not across:
            given = iter(xs)
            parts = [
                compact(next(given).expand(*s)) if c else torch.full((1,) * len(s), -1)
                for c, s in zip(step.carries, step.in_shapes, strict=True)
            ]
            whole = [
                p.expand([s[d] if d == step.dim else 1 for d in range(len(s))])
                for p, s in zip(parts, step.in_shapes, strict=True)
            ]
            return torch.cat(whole, step.dim).expand(out)
        place = step.where or "the model"
        if not all(step.carries):
            for x in xs:
                self._keep(x, f"{place} joins it with a tensor that keeps its width")
            return _all_fixed(out)
        result = compact(
            xs[0]
        )  # along another dimension than the channels, which are then the same
        for x in xs[1:]:
            v = compact(x)
            around = torch.broadcast_shapes(result.shape, v.shape)
            u, v = result.expand(around), v.expand(around)
            self._join(u.flatten(), v.flatten(), f"a value in {place} that keeps its width")
        return result.expand(out)

    def _in_place(self, step: Replay | MaxPool, labels: Tensor) -> Tensor:
        """Pools, padding, resizing: allowed as long as every channel stays where it is."""
        labels = labels.expand(*step.in_shape)
        shape = step.out_shape if isinstance(step, MaxPool) else _result_shape(step)
        dims = _varying(labels)
        if len(dims) == 0:
            return compact(labels).amax().expand(shape)
        place = step.where or "the model"
        reason = f"{step.op} in {place} moves its channels"
        dim = dims[0]
        if isinstance(step, Replay) and len(dims) == 1 and len(shape) < labels.dim():
            return self._reduced(step, labels, shape, dim)
        if len(dims) > 1 or len(shape) != labels.dim() or shape[dim] != labels.shape[dim]:
            return self._fixed(labels, shape, reason)
        others = [d for d in range(len(shape)) if d != dim]
        before = compact(labels).amax(others, keepdim=True)
        if isinstance(step, Replay):
            try:
                after = self._replayed(step, labels)
            except NotImplementedError:
                return self._fixed(labels, shape, f"{step.op} in {place} mixes its channels")
            if not torch.equal(after.amax(others, keepdim=True), before):
                return self._fixed(labels, shape, reason)
        return before.expand(shape)

    def _reduced(self, step: Replay, labels: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
        """A reduction that drops dimensions: allowed where it leaves one for the channels."""
        place = step.where or "the model"
        channels = labels.movedim(dim, 0).flatten(1)[:, 0]
        try:
            after = self._replayed(step, labels)
        except NotImplementedError:
            return self._fixed(labels, shape, f"{step.op} in {place} mixes its channels")
        for d, size in enumerate(shape):
            if size == len(channels):
                placed = channels.view([-1 if at == d else 1 for at in range(len(shape))])
                if torch.equal(after, placed.expand(shape)):
                    return placed.expand(shape)
        return self._fixed(labels, shape, f"{step.op} in {place} moves its channels")

    # --- joining ---------------------------------------------------------------------------------

    def _join(self, u: Tensor, v: Tensor, other: str) -> None:
        """Units that go together, pair by pair; with what is fixed or no unit, they stay."""
        for units, partner in ((u, v), (v, u)):
            stay = (units > _FIXED) & (partner <= _FIXED)
            if bool(stay.any()):
                self._keep(units[stay], f"it is coupled with {other}")
        joined = (u > _FIXED) & (v > _FIXED) & (u != v)
        for a, b in zip(u[joined].tolist(), v[joined].tolist(), strict=True):
            a, b = self._root(a), self._root(b)
            self.parent[max(a, b)] = min(a, b)

    def _root(self, unit: int) -> int:
        parent = self.parent
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    def _collected(self) -> ChannelGroups:
        roots = torch.tensor([self._root(unit) for unit in range(self.total)])
        stays: dict[int, str] = {}
        for units, reason in self.fixed:
            for root in roots[units].unique().tolist():
                stays.setdefault(root, reason)
        groups, whole = [], {}
        for members in self._coupled(roots):
            rows = {m.step.parameter: roots[m.base : m.base + m.out] for m in members}
            kept = [root for r in rows.values() for root in r.unique().tolist() if root in stays]
            if kept:
                whole.update(dict.fromkeys(rows, stays[kept[0]]))
                continue
            channels = torch.cat(list(rows.values())).unique()
            number = torch.full((self.total + 1,), -1)  # the last for inputs that read none
            number[channels] = torch.arange(len(channels))
            reads = {layer.step.parameter: number[_at(roots, layer.reads)] for layer in self.layers}
            norms = {name: number[_at(roots, entries)] for name, entries in self.norms}
            groups.append(
                ChannelGroup(
                    members[0].step.parameter.removesuffix(".weight"),
                    len(channels),
                    {name: number[r] for name, r in rows.items()},
                    {name: c for name, c in reads.items() if bool((c >= 0).any())},
                    {name: c for name, c in norms.items() if bool((c >= 0).any())},
                )
            )
        return ChannelGroups(tuple(groups), whole)

    def _coupled(self, roots: Tensor) -> list[list[_Layer]]:
        """Layers that have a channel in common."""
        first: dict[int, int] = {}
        owner = list(range(len(self.layers)))

        def top(at: int) -> int:
            while owner[at] != at:
                at = owner[at]
            return at

        for at, layer in enumerate(self.layers):
            for root in roots[layer.base : layer.base + layer.out].unique().tolist():
                a, b = top(first.setdefault(root, at)), top(at)
                owner[max(a, b)] = min(a, b)
        found: dict[int, list[_Layer]] = {}
        for at, layer in enumerate(self.layers):
            found.setdefault(top(at), []).append(layer)
        return list(found.values())


def _at(roots: Tensor, units: Tensor) -> Tensor:
    """Roots of units, -1 (the last entry of what is looked up) where there is none."""
    return torch.where(units >= 0, roots[units.clamp(min=0)], -1)


def _all_fixed(shape: Sequence[int]) -> Tensor:
    return torch.full((1,) * len(shape), _FIXED).expand(tuple(shape))


def _varying(labels: Tensor) -> list[int]:
    """Dimensions along which labels change."""
    flat = compact(labels)
    return [
        d for d, n in enumerate(flat.shape) if n > 1 and bool((flat != flat.narrow(d, 0, 1)).any())
    ]


def _takes_apart(step: Reshape, labels: Tensor) -> bool:
    """Whether a dimension along which labels change is cut into several."""
    varying = _varying(labels.expand(*step.in_shape))
    return any(
        len(after) > 1 and any(d in varying for d in before)
        for before, after in _aligned(step.in_shape, step.out_shape)
    )


def _aligned(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The dimensions of both shapes in the smallest runs of equal sizes; those of 1 left out."""
    left = [d for d, n in enumerate(before) if n != 1]
    right = [d for d, n in enumerate(after) if n != 1]
    i = j = 0
    while i < len(left) and j < len(right):
        starts, sizes = (i, j), [before[left[i]], after[right[j]]]
        i, j = i + 1, j + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                sizes[0] *= before[left[i]]
                i += 1
            else:
                sizes[1] *= after[right[j]]
                j += 1
        yield left[starts[0] : i], right[starts[1] : j]


def _is_plain(step: Scale, labels: Tensor) -> bool:
    """Whether the factor is the same for all channels."""
    rank = len(step.out_shape)
    factor = (1,) * (rank - len(step.factor_shape)) + tuple(step.factor_shape)
    lead = rank - labels.dim()
    return all(factor[d + lead] == 1 for d in _varying(labels))


def _result_shape(step: Replay) -> tuple[int, ...]:
    return tuple(step.fn(torch.zeros(step.in_shape)).shape)


__all__ = ["ChannelGroup", "ChannelGroups", "channel_groups"]
