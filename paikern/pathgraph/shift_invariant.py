"""The same path graph on channel vectors: convolutions without borders.

A convolution that wraps around maps an input that is constant over space to an output that is, so
one number a channel is all there is to carry:

    y[o] = sum_i (sum_taps V[o, i, tap]) a[i]       score of (o, i, tap) = |w|**p * a[i] * G[o]

with G the outgoing counts of a channel, added up over its positions. A map `[N, C, *size]` becomes
`[N, C, 1, ..]` and a convolution a product of the stored weight, seen as `[O, I * taps]`, with a
vector in which every channel stands `taps` times. Padding is ignored: with circular padding, and
with none, this is exact; with zeros it is the network without border effects. Stride and dilation
make no difference to a constant.

Sums of counts stay sums: what spreads a vector over a map (`Expand`) adds up on the way back, and
what makes a map a vector (`Mean`) spreads evenly. So a step that needs the whole map gets it, and
the scores of every layer that cuts the graph still add up to R.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from paikern.pathgraph.graph import PathGraph
from paikern.pathgraph.steps import (
    Add,
    Attention,
    Cat,
    Expand,
    MaxPool,
    Mean,
    Norm,
    Permute,
    Rectify,
    Replay,
    Reshape,
    Scale,
    Slice,
    Step,
    Weight,
)

Shape = tuple[int, ...]
Axes = frozenset[int]
_NONE: Axes = frozenset()
# Zero padding is a step of its own where a model pads by itself, or unevenly in a convolution.
_PADS = ("aten.pad", "aten.constant_pad_nd", "aten.conv")


def shift_invariant(graph: PathGraph) -> PathGraph:
    """`graph` with the maps between convolutions reduced to one number a channel.

    Norms, scales, sums, slices, concatenations, permutations and reshapes that keep positions and
    channels apart run on vectors; so do linear layers on them, and pools, resizing and circular
    padding that return the constant they are given. Zero padding as a step of its own is ignored
    like that of a convolution. Any other step (transposed convolutions, attention, flattening)
    gets the whole map, and a convolution after it the mean over space.

    Args:
        graph: from `trace`; it is not changed.

    Returns:
        A graph of the same parameters and output shapes; `graph` itself where nothing is convolved.

    Source: SynFlow, Tanaka et al. 2020 (arXiv:2006.05467), equation 2, on constant maps.

    Example:
        >>> import torch
        >>> from paikern.pathgraph import trace
        >>> conv = torch.nn.Conv2d(2, 4, 3, padding=1)
        >>> graph = shift_invariant(trace(conv, torch.ones(1, 2, 8, 8)))
        >>> graph.weights[0].kind, graph.weights[0].in_shape, graph.weights[0].out_shape
        ('linear', (1, 18), (1, 4))
    """
    if not any(step.kind == "conv" for step in graph.weights):
        return graph
    return _Builder().build(graph)


@dataclass(frozen=True)
class _Value:
    """A value of the old graph.

    `axes` are those over which it counts as constant. `forms` are the values of the new graph that
    stand for it, by the axes along which they have size 1; axes of size 1 as such are never named.
    """

    shape: Shape
    axes: Axes
    forms: dict[Axes, int]


@dataclass
class _Builder:
    steps: list[Step] = field(default_factory=list)
    values: dict[int, _Value] = field(default_factory=dict)
    ids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    where: str = ""
    op: str = ""

    def build(self, graph: PathGraph) -> PathGraph:
        inputs = {}
        for id_, shape in graph.inputs.items():  # ones: constant over whatever one likes
            new, axes = next(self.ids), _sizable(_spatial(shape), shape)
            inputs[new] = _small(shape, axes)
            self.values[id_] = _Value(shape, axes, {axes: new})
        for step in graph.steps:
            self.where, self.op = step.where, step.op
            self.add(step)
        outputs = tuple(self.read(id_, _NONE) for id_ in graph.outputs)
        return PathGraph(tuple(self.steps), inputs, outputs, graph.notes)

    # --- values -------------------------------------------------------------------------------

    def read(self, id_: int, axes: Iterable[int]) -> int:
        """The value of size 1 along `axes` and whole along all others, made if it is not there."""
        value = self.values[id_]
        wanted = _sizable(axes, value.shape)
        if wanted not in value.forms:
            # A mean of what is whole is right whether or not the value is constant.
            fitting = [held for held in value.forms if held <= wanted]
            held = max(fitting, key=len) if fitting else next(iter(value.forms))
            new, both = value.forms[held], _small(value.shape, held | wanted)
            if wanted - held:
                dims = tuple(sorted(wanted - held))
                new = self.emit(Mean, [new], _small(value.shape, held), dims, both, True)
            if held - wanted:
                new = self.emit(Expand, [new], both, _small(value.shape, wanted))
            value.forms[wanted] = new
        return value.forms[wanted]

    def put(self, step: Step, shape: Shape, axes: Iterable[int], new: int) -> None:
        """What `step` wrote is `new`, which has size 1 along `axes`."""
        held = _sizable(axes, shape)
        self.values[step.output] = _Value(shape, held, {held: new})

    def emit(self, make: Any, inputs: list[int], *args: Any) -> int:
        """A new step, named after the old one that it serves."""
        new = next(self.ids)
        self.steps.append(make(tuple(inputs), new, self.where, self.op, *args))
        return new

    def same(self, step: Step, inputs: list[int], **changes: Any) -> int:
        """The old step between new values."""
        new = next(self.ids)
        self.steps.append(replace(step, inputs=tuple(inputs), output=new, **changes))
        return new

    def whole(self, step: Step, shape: Shape, axes: Axes = _NONE) -> None:
        """The old step on whole values; its result counts as constant over `axes`."""
        new = self.same(step, [self.read(i, _NONE) for i in step.inputs])
        self.values[step.output] = _Value(shape, _sizable(axes, shape), {_NONE: new})

    # --- steps --------------------------------------------------------------------------------

    def add(self, step: Step) -> None:
        if isinstance(step, Weight):
            self.weight(step)
        elif isinstance(step, Norm):
            self.elementwise(step, self.values[step.inputs[0]].shape, step.shape)
        elif isinstance(step, Scale):
            self.elementwise(step, step.out_shape, step.factor_shape)
        elif isinstance(step, Rectify):
            self.elementwise(step, self.values[step.inputs[0]].shape, ())
        elif isinstance(step, Add):
            self.elementwise(step, step.out_shape, ())
        elif isinstance(step, Cat):
            self.cat(step)
        elif isinstance(step, Reshape):
            self.reshape(step)
        elif isinstance(step, Permute):
            self.permute(step)
        elif isinstance(step, Slice):
            self.slice(step)
        elif isinstance(step, Mean):
            self.mean(step)
        elif isinstance(step, MaxPool):
            self.max_pool(step)
        elif isinstance(step, Replay):
            self.replay(step)
        elif isinstance(step, (Expand, Attention)):
            self.whole(step, step.out_shape)
        else:
            raise TypeError(f"shift_invariant: no rule for a step {type(step).__name__}")

    def weight(self, step: Weight) -> None:
        value = self.values[step.inputs[0]]
        if step.kind == "linear":
            axes = value.axes - {len(value.shape) - 1}
            small, out = _small(step.in_shape, axes), _small(step.out_shape, axes)
            new = self.same(step, [self.read(step.inputs[0], axes)], in_shape=small, out_shape=out)
            self.put(step, step.out_shape, axes, new)
        elif step.transposed:  # zeros between the inputs: its output is not constant
            self.whole(step, step.out_shape, _spatial(step.out_shape))
        else:
            self.convolution(step)

    def convolution(self, step: Weight) -> None:
        axes, batch, ones = _spatial(step.in_shape), step.in_shape[:1], (1,) * len(step.kernel)
        channels, rows = step.in_shape[1], step.out_shape[1]
        new, window = self.read(step.inputs[0], axes), (*batch, channels, *step.kernel)
        if math.prod(step.kernel) > 1:  # one window of the map, all that any output sees
            new = self.emit(Expand, [new], _small(step.in_shape, axes), window)
        if step.groups > 1:
            new = self.same(
                step, [new], in_shape=window, out_shape=(*batch, rows, *ones),
                stride=ones, padding=(0,) * len(ones), dilation=ones,
            )  # fmt: skip
        else:
            vector = (*batch, channels * math.prod(step.kernel))
            new = self.emit(Reshape, [new], window, vector)
            new = self.same(
                step, [new], kind="linear", in_shape=vector, out_shape=(*batch, rows),
                stride=(), padding=(), dilation=(), kernel=(),
            )  # fmt: skip
            new = self.emit(Reshape, [new], (*batch, rows), (*batch, rows, *ones))
        self.put(step, step.out_shape, axes, new)

    def elementwise(self, step: Step, out: Shape, factor: Shape) -> None:
        """Norms, scales, sums: constant where all branches and the factor are."""
        branches = [self.values[i] for i in step.inputs]
        axes = _broadcast_axes(factor, _NONE, out)
        for value in branches:
            axes &= _broadcast_axes(value.shape, value.axes, out)
        inputs, shapes = [], []
        for i, value in zip(step.inputs, branches, strict=True):
            ahead = len(out) - len(value.shape)
            own = {d - ahead for d in axes if d >= ahead}
            inputs.append(self.read(i, own))
            shapes.append(_small(value.shape, own))
        changes: dict[str, Any] = {}
        if isinstance(step, Add):
            changes = {"in_shapes": tuple(shapes), "out_shape": _small(out, axes)}
        elif isinstance(step, Scale):
            changes = {"in_shape": shapes[0], "out_shape": _small(out, axes)}
        self.put(step, out, axes, self.same(step, inputs, **changes))

    def cat(self, step: Cat) -> None:
        branches = [self.values[i] for i in step.inputs]
        axes = frozenset.intersection(*(value.axes for value in branches)) - {step.dim}
        shapes = tuple(_small(shape, axes) for shape in step.in_shapes)
        new = self.same(step, [self.read(i, axes) for i in step.inputs], in_shapes=shapes)
        width = sum(shape[step.dim] for shape in step.in_shapes)
        shape = branches[0].shape
        self.put(step, (*shape[: step.dim], width, *shape[step.dim + 1 :]), axes, new)

    def reshape(self, step: Reshape) -> None:
        """Trailing positions stay apart if what lies before them is cut the same way."""
        value = self.values[step.inputs[0]]
        first = min(value.axes, default=len(value.shape))
        ahead, rest = math.prod(value.shape[:first]), range(first, len(value.shape))
        cuts = [d for d in range(len(step.out_shape) + 1) if math.prod(step.out_shape[:d]) == ahead]
        if not cuts or _sizable(rest, value.shape) != value.axes:
            self.whole(step, step.out_shape)
            return
        axes = _sizable(range(cuts[0], len(step.out_shape)), step.out_shape)
        shapes = _small(value.shape, value.axes), _small(step.out_shape, axes)
        new = self.emit(Reshape, [self.read(step.inputs[0], value.axes)], *shapes)
        self.put(step, step.out_shape, axes, new)

    def permute(self, step: Permute) -> None:
        value = self.values[step.inputs[0]]
        axes = {position for position, dim in enumerate(step.dims) if dim in value.axes}
        new = self.same(step, [self.read(step.inputs[0], value.axes)])
        self.put(step, tuple(value.shape[d] for d in step.dims), axes, new)

    def slice(self, step: Slice) -> None:
        value = self.values[step.inputs[0]]
        dropped = len(step.out_shape) < len(step.in_shape)
        left = value.axes - {step.dim} if dropped else value.axes
        axes = {d - 1 if dropped and d > step.dim else d for d in left}
        new, out = self.read(step.inputs[0], value.axes), _small(step.out_shape, axes)
        small = _small(step.in_shape, value.axes)
        if step.dim not in value.axes:
            new = self.same(step, [new], in_shape=small, out_shape=out)
        elif dropped:  # one position of many that are alike
            new = self.emit(Reshape, [new], small, out)
        self.put(step, step.out_shape, axes, new)

    def mean(self, step: Mean) -> None:
        value, dims = self.values[step.inputs[0]], frozenset(step.dims)
        source = value.axes if step.average else value.axes - dims  # a sum counts its positions
        small = _small(step.in_shape, source)
        keeps = len(step.out_shape) == len(step.in_shape)
        axes = {d if keeps else d - sum(e < d for e in dims) for d in value.axes - dims}
        out = _small(step.out_shape, axes)
        new = self.same(step, [self.read(step.inputs[0], source)], in_shape=small, out_shape=out)
        self.put(step, step.out_shape, axes, new)

    def max_pool(self, step: MaxPool) -> None:
        """The maximum of a constant: in every window, as padding is never the maximum."""
        value = self.values[step.inputs[0]]
        pooled = range(len(value.shape) - step.spatial, len(value.shape))
        hollow = max(step.dilation) > 1 and max(step.padding) > 0  # a window may miss the map
        if hollow or _sizable(pooled, value.shape) - value.axes:
            self.whole(step, step.out_shape, value.axes)
            return
        axes = value.axes | set(pooled)
        self.put(step, step.out_shape, axes, self.read(step.inputs[0], axes))

    def replay(self, step: Replay) -> None:
        """Tried on a map that is constant over space: what does the operation make of it?"""
        value = self.values[step.inputs[0]]
        generator = torch.Generator().manual_seed(0)  # channels that no mixing leaves as they are
        x = 1 + torch.rand(_small(step.in_shape, value.axes), generator=generator)
        y = step.fn(x.expand(step.in_shape))
        shape = tuple(y.shape)
        if not value.axes or y.dim() != x.dim():
            self.whole(step, shape)
            return
        rest = set(range(y.dim())) - value.axes
        alike = all(shape[d] == step.in_shape[d] for d in rest)
        if alike:
            same = torch.isclose(y, x.expand(shape), rtol=1e-5)
            if step.op.startswith(_PADS):
                same |= y == 0
            if bool(same.all()):
                self.put(step, shape, value.axes, self.read(step.inputs[0], value.axes))
                return
        constant = torch.allclose(y, y.mean(tuple(value.axes), keepdim=True), rtol=1e-5)
        self.whole(step, shape, value.axes if alike or constant else _NONE)


def _spatial(shape: Shape) -> Axes:
    """The axes of a map after batch and channel."""
    return frozenset(range(2, len(shape)))


def _sizable(axes: Iterable[int], shape: Shape) -> Axes:
    """Without the axes of size 1, over which everything is constant."""
    return frozenset(d for d in axes if shape[d] != 1)


def _small(shape: Shape, axes: Iterable[int]) -> Shape:
    """`shape` with size 1 along `axes`."""
    return tuple(1 if d in axes else n for d, n in enumerate(shape))


def _broadcast_axes(shape: Shape, axes: Axes, out: Shape) -> Axes:
    """Where a tensor that is constant over `axes` does not vary once it is broadcast to `out`."""
    ahead = len(out) - len(shape)
    return frozenset(
        d for d in range(len(out)) if d < ahead or d - ahead in axes or shape[d - ahead] == 1
    ) & _sizable(range(len(out)), out)
