"""A path graph as a table of instructions for device sweeps, with nothing left to ask the host.

What `Program` is to the CPU: every map has a place in one arena, every product its geometry. Here
powers of two live on the device as well: each value that is written has a slot for its own, and is
brought into [1, 2) when it is read (csrc/cuda/map_scale.cuh). Which of several arrivals at a value
comes first is known from the graph, so that the table needs no decisions. Operations without an
instruction (attention, permutations, what a rule replays) run between two parts of the table, as
torch's own, on maps that are brought to one power of two first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paikern.backends import cuda_flow as table
from paikern.backends.cuda_flow import FlowTable, Instruction, Product, Term
from paikern.backends.cuda_layers import geometry
from paikern.errors import NonFiniteScoreError
from paikern.pathgraph import steps as kinds
from paikern.pathgraph.flow import Flow, device_of, not_finite
from paikern.pathgraph.places import Map, lay_out, pair, shapes_of, values_of
from paikern.pathgraph.steps import State, Step

_ADJOINTS = {
    table.MEAN: table.SPREAD,
    table.POOL: table.UNPOOL,
    table.RECTIFY: table.UNRECTIFY,
}


class Visit(NamedTuple):
    """Both maps of a weight step, with the slots of their powers of two.

    x, g: of the columns and of the rows of the stored matrix. y: what came out going forwards.
    """

    step: kinds.Weight
    number: int
    x: Term
    g: Term
    y: Term
    product: Product


class DeviceProgram:
    """Both sweeps of `flow` over the tensors in `state`, on their device.

    Args:
        flow: float32 with powers of two.
        masks: one packed mask for each parity of the rounds, by parameter; the others are dense.
        keep: as in `Program`.
        rounds: how many may be run.
        visit: called for every weight step while the sweep back is written, to add instructions
            before the adjoint of the step.
    """

    def __init__(
        self,
        flow: Flow,
        state: State,
        masks: Mapping[str, tuple[Tensor, ...]],
        keep: str,
        rounds: int,
        visit: Callable[[DeviceProgram, Visit], None] | None = None,
        parities: int = 2,
    ) -> None:
        self.flow, self._masks, self._visit = flow, masks, visit
        flow.bind(state)
        self.device = device_of(state)
        self.steps = [s for s in flow.plan.steps if not isinstance(s[0], kinds.Reshape)]
        self._values = values_of(flow)
        arena = torch.empty(lay_out(flow, self.steps, self._values, keep, {}), device=self.device)
        self._arena = arena
        self.table = FlowTable(arena, rounds, flow.counts)
        self.visits: list[Visit] = []
        # Those that read a stored matrix by columns, by the number of the step.
        self.adjoints: dict[int, Instruction] = {}
        self._held: list[Tensor] = []
        self._weights: dict[tuple[object, ...], Tensor] = {}
        self._saved: dict[int, Any] = {}
        self._calls: list[tuple[int, Callable[[], None]]] = []
        self._slot_of: dict[int, int] = {}  # of incoming counts, by root
        self._scratch = torch.empty(
            max((v.a.numel for v in self._values.values()), default=0), device=self.device
        )
        self._weight_slots: list[tuple[int, int]] = []  # (number of the step, slot), forwards
        self._back_slots: list[tuple[int, int]] = []
        # The numbers that change from round to round: filled before the first.
        self.per_round: list[tuple[Tensor, Tensor]] = []
        self._reset = self.table.add(Instruction(table.RESET))
        self._forward()
        self._backward()
        self.parities = parities

    # --- running -------------------------------------------------------------------------------

    def finish(self) -> None:
        """No more instructions: the table goes to the device."""
        reset = self.table.instructions[self._reset]
        reset.terms = [Term(rows, -1, now.numel(), now) for rows, now in self.per_round]
        self.table.finish(self.parities)

    def run(self, parity: int, first: int = 0, last: int | None = None) -> None:
        """Start the instructions and the calls between them, in their order."""
        at, end = first, len(self.table.instructions) if last is None else last
        for number, call in self._calls:
            if first <= number < end:
                self.table.run(parity, at, number + 1)
                call()
                at = number + 1
        self.table.run(parity, at, end)

    def name(self, index: int) -> str:
        """The parameter of a step, for messages."""
        step = self.steps[index][0]
        return step.parameter if isinstance(step, kinds.Weight) else step.where or step.op

    def overflow(self, index: int) -> NonFiniteScoreError:
        """The error of a sweep whose counts were not finite."""
        return not_finite(self.name(index))

    # --- instructions --------------------------------------------------------------------------

    def _view(self, m: Map, shape: tuple[int, ...]) -> Tensor:
        return self._arena[m.offset : m.offset + m.numel].view(shape)

    def _a(self, id_: int) -> Term:
        v = self._values[id_]
        return Term(self._view(v.a, v.shape), self._slot_of[v.root])

    def _hold(self, tensor: Tensor) -> Tensor:
        self._held.append(tensor)
        return tensor

    def _forward(self) -> None:
        add, slot = self.table.add, self.table.slot
        for id_ in self.flow.graph.inputs:
            v = self._values[id_]
            self._slot_of[v.root] = slot()
            out = self._view(v.a, v.shape)
            add(Instruction(table.FILL, out, self._slot_of[v.root]))
        for index, (step, inputs, output) in enumerate(self.steps):
            v = self._values[output]
            made = self._slot_of[v.root] = slot()
            out = self._view(v.a, v.shape)
            given = [self._a(i) for i in inputs]
            if isinstance(step, kinds.Weight):
                product = self._product(step, given[0], Term(out, made), True)
                kind = table.ADJOINT if step.transposed else table.FORWARD
                add(Instruction(kind, out, made, given[0].slot, product=product))
                self._weight_slots.append((index, made))
                if self.flow.semantics.offsets and step.bias is not None:
                    self._add_bias(step, out, v.root)
            elif not self._small(index, step, given, out, made):
                self._call(index, step, given, out, made)
        self._outputs = list(dict.fromkeys(self._values[i].root for i in self.flow.plan.outputs))
        add(Instruction(table.TOTAL, terms=[self._a(i) for i in self._outputs]))

    def _add_bias(self, step: kinds.Weight, out: Tensor, root: int) -> None:
        bias = self.flow.bias_offset(step).float().reshape(-1).contiguous()
        linear = step.kind == "linear"
        before, after = Term(out, self._slot_of[root]), self.table.slot()
        self.table.add(
            Instruction(
                table.SCALE, out, after, before.slot, terms=(before,), offset=self._hold(bias),
                channels=out.shape[-1] if linear else out.shape[1],
                inner=1 if linear else max(1, math.prod(out.shape[2:])),
            )
        )  # fmt: skip
        self._slot_of[root] = after

    def _backward(self) -> None:
        add, slot = self.table.add, self.table.slot
        arrived: dict[int, Term] = {}
        for root in self._outputs:
            v = self._values[root]
            if v.start:
                continue
            arrived[root] = Term(self._view(v.g, v.shape), slot())
            add(Instruction(table.FILL, arrived[root].values, arrived[root].slot))
        for index in range(len(self.steps) - 1, -1, -1):
            step, inputs, output = self.steps[index]
            v = self._values[output]
            g = arrived.pop(v.root, None)
            if g is None:
                continue
            g = g._replace(values=self._view(v.g, v.shape))
            if isinstance(step, kinds.Weight):
                self._back(index, step, inputs[0], output, g, arrived)
            elif isinstance(step, kinds.Add) and self._plain(step):
                for i in inputs:
                    self._arrive(arrived, i, g)
            else:
                self._small_back(index, step, inputs, g, arrived)

    def _back(
        self, index: int, step: kinds.Weight, i: int, output: int, g: Term,
        arrived: dict[int, Term],
    ) -> None:  # fmt: skip
        x, y = self._a(i), self._a(output)
        both = (g, x) if step.transposed else (x, g)
        seen = Visit(step, index, *both, y, self._product(step, x, g, None))
        self.visits.append(seen)
        if self._visit is not None:
            self._visit(self, seen)
        if self._values[i].start:
            return
        to = self._target(arrived, i)
        product = self._product(step, to, g, False)
        kind = table.FORWARD if step.transposed else table.ADJOINT
        adjoint = Instruction(kind, to.values, to.slot, g.slot, product=product)
        self.table.add(adjoint)
        if not step.transposed:
            self.adjoints[index] = adjoint
        self._back_slots.append((index, to.slot))
        self._landed(arrived, i, to)

    def _product(self, step: kinds.Weight, x: Term, g: Term, forwards: bool | None) -> Product:
        """`x` and `g` are those of the step; the kernels see those of the stored matrix."""
        parameter = self.flow.state[step.parameter]
        used = parameter if step.rows is None else parameter[slice(*step.rows)]
        used = used.flatten(1) if step.kind == "linear" else used
        power = self.flow.semantics.power
        weight = None
        if power:  # one copy at most of what lies in another order, for all its products
            key = (step.parameter, step.rows, step.kind)
            if key not in self._weights:
                self._weights[key] = used.detach().contiguous()
            weight = self._weights[key]
        columns, rows = (g, x) if step.transposed else (x, g)
        top = -1 if forwards is None else (g if forwards else x).slot
        first = 0 if step.rows is None else step.rows[0] * math.prod(parameter.shape[1:])
        return Product(
            weight, power, self._masks.get(step.parameter, ()), first,
            stored_geometry(step, used, columns.values, rows.values),
            columns.values, rows.values,
            -1 if columns.slot == top else columns.slot, -1 if rows.slot == top else rows.slot, top,
        )  # fmt: skip

    def _target(self, arrived: dict[int, Term], i: int, scratch: Tensor | None = None) -> Term:
        """Where an adjoint may write: the value itself if it is the first to arrive."""
        v = self._values[i]
        if v.root not in arrived:
            return Term(self._view(v.g, v.shape), self.table.slot())
        held = self._scratch if scratch is None else scratch
        return Term(held[: v.g.numel].view(v.shape), self.table.slot())

    def _landed(self, arrived: dict[int, Term], i: int, term: Term) -> None:
        """What was written to `_target` is there."""
        v = self._values[i]
        before = arrived.get(v.root)
        if before is None:
            arrived[v.root] = term
            return
        joined = before._replace(slot=self.table.slot())
        self.table.add(
            Instruction(table.JOIN, joined.values, joined.slot, terms=(before, term), last=2)
        )
        arrived[v.root] = joined

    def _arrive(self, arrived: dict[int, Term], i: int, term: Term) -> None:
        """A map that others need as well arrives at a value."""
        v = self._values[i]
        if v.start:
            return
        if v.root in arrived:
            self._landed(arrived, i, term)
            return
        to = self._target(arrived, i)
        self.table.add(Instruction(table.JOIN, to.values, to.slot, terms=(term,), last=1))
        arrived[v.root] = to

    def _plain(self, step: kinds.Add) -> bool:
        return all(tuple(shape) == tuple(step.out_shape) for shape in step.in_shapes)

    def _small(self, index: int, step: Step, given: list[Term], out: Tensor, slot: int) -> bool:
        """One instruction for a step between two weights; False if there is none."""
        made = self._describe(index, step, out.shape, given[0].values.shape)
        if isinstance(step, kinds.Add) and self._plain(step):
            made = Instruction(table.JOIN, last=len(given), average=self.flow.counts)
        if made is None:
            return False
        made.out, made.slot, made.terms = out, slot, given
        if made.kind != table.JOIN:
            made.source = given[0].slot
        self.table.add(made)
        return True

    def _small_back(
        self, index: int, step: Step, inputs: Sequence[int], g: Term, arrived: dict[int, Term]
    ) -> None:
        made = self._describe(index, step, g.values.shape, self._values[inputs[0]].shape)
        if made is None:
            self._call_back(index, step, inputs, g, arrived)
            return
        if self._values[inputs[0]].start:
            return
        made.kind, made.offset = _ADJOINTS.get(made.kind, made.kind), None
        to = self._target(arrived, inputs[0])
        made.out, made.slot, made.source, made.terms = to.values, to.slot, g.slot, (g,)
        if made.kind == table.UNRECTIFY:
            made.terms = (g, self._a(self.steps[index][2]))
        self.table.add(made)
        self._landed(arrived, inputs[0], to)

    def _describe(
        self, index: int, step: Step, out: Sequence[int], given: Sequence[int]
    ) -> Instruction | None:
        """The instruction of a step forwards, without its maps."""
        like = torch.empty((), device=self.device)
        if isinstance(step, kinds.Norm):
            return self._per_channel(out, *self.flow.norm_factors(step, like))
        if isinstance(step, kinds.Rectify):
            return Instruction(table.RECTIFY)
        if isinstance(step, kinds.Scale) and step.in_shape == step.out_shape:
            return self._per_channel(out, self.flow.scale_factor(step, like), None)
        if isinstance(step, kinds.Mean):
            dims = sorted(d % len(step.in_shape) for d in step.dims)
            if dims and dims == list(range(dims[0], dims[-1] + 1)):
                shape = step.in_shape
                return Instruction(
                    table.MEAN, outer=math.prod(shape[: dims[0]]),
                    channels=math.prod(shape[dims[0] : dims[-1] + 1]),
                    inner=math.prod(shape[dims[-1] + 1 :]), average=step.average,
                )  # fmt: skip
        if isinstance(step, kinds.MaxPool) and step.spatial <= 2:
            places = self._saved.get(index)
            if places is None:
                count = math.prod(step.out_shape)
                places = torch.empty(count, dtype=torch.int32, device=self.device)
                self._saved[index] = places
            window = (step.kernel, step.stride or step.kernel, step.padding, step.dilation)
            shapes = (step.in_shape[-step.spatial :], step.out_shape[-step.spatial :])
            if step.spatial == 1:  # of height 1
                fills = (1, 1, 1, 1, 0, 1)
                numbers = [(f, *v) for f, v in zip(fills, (*shapes, *window), strict=True)]
            else:
                numbers = [pair(v) for v in (*shapes, *window)]
            planes = math.prod(step.in_shape[: -step.spatial])
            pool = [planes, *(n for two in numbers for n in two)]
            return Instruction(table.POOL, pool=pool, places=places)
        return None

    def _per_channel(
        self, out: Sequence[int], factor: Tensor | None, offset: Tensor | None
    ) -> Instruction:
        """Factors and offsets along one axis of the map, one for all of it, or one for each."""
        given = [t for t in (factor, offset) if t is not None]
        wide = [[1] * (len(out) - t.dim()) + list(t.shape) for t in given]
        long = {d for shape in wide for d, n in enumerate(shape) if n > 1}
        axis = next(iter(long), None)
        channels = 1 if axis is None else out[axis]
        inner = math.prod(out if axis is None else out[axis + 1 :])
        if len(long) > 1:  # as large as the map
            channels, inner = math.prod(out), 1

        def flat(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            t = t.float()
            t = t.expand(*out).reshape(-1) if len(long) > 1 else t.reshape(-1).expand(channels)
            return self._hold(t.contiguous())

        both = [flat(factor), flat(offset)]
        return Instruction(
            table.SCALE, channels=channels, inner=max(1, inner), factor=both[0], offset=both[1]
        )

    # --- operations without an instruction -------------------------------------------------------

    def _aligned(self, given: list[Term], slot: int) -> list[Tensor]:
        """Copies of maps that have one power of two, that of `slot`."""
        copies = [torch.empty_like(t.values) for t in given]
        for n, copy in enumerate(copies):
            self.table.add(
                Instruction(
                    table.JOIN, copy, slot if n == 0 else self.table.slot(), terms=given, first=n,
                    last=n + 1, average=self.flow.counts,
                )
            )  # fmt: skip
        return copies

    def _call(self, index: int, step: Step, given: list[Term], out: Tensor, slot: int) -> None:
        copies = self._aligned(given, slot)

        # Made now: a constant of the CPU cannot be copied while a graph is recorded.
        factor = None
        if isinstance(step, kinds.Scale):
            factor = self.flow.scale_factor(step, copies[0])

        def call() -> None:
            with torch.no_grad():
                if factor is not None:
                    y, self._saved[index] = copies[0] * factor, factor
                else:
                    y, _, self._saved[index] = self.flow.run_step(step, [(c, 0) for c in copies])
                out.copy_(y)

        self._calls.append((len(self.table.instructions) - 1, call))

    def _call_back(
        self, index: int, step: Step, inputs: Sequence[int], g: Term, arrived: dict[int, Term]
    ) -> None:
        slot = self.table.slot()
        (copy,) = self._aligned([g], slot)
        # Each part has a place of its own: they come at once.
        parts: list[Term | None] = []
        first: dict[int, Term] = {}
        for i in inputs:
            v = self._values[i]
            if v.start:
                parts.append(None)
                continue
            seen = arrived if v.root in arrived else first
            scratch = torch.empty(v.g.numel, device=self.device) if v.root in seen else None
            place = self._target(seen, i, scratch)._replace(slot=slot)
            first.setdefault(v.root, place)
            parts.append(place)

        def call() -> None:
            with torch.no_grad():
                made = self.flow.run_adjoint(step, copy, self._saved[index])
                for to, part in zip(parts, made, strict=True):
                    if to is not None:
                        to.values.copy_(part)

        self._calls.append((len(self.table.instructions) - 1, call))
        for i, to in zip(inputs, parts, strict=True):
            if to is not None:
                self._landed(arrived, i, to)

    # --- what comes after both sweeps ------------------------------------------------------------

    def keep_maps(self, visits: Sequence[Visit | None]) -> Tensor:
        """Bring the maps of these steps into [1, 2) for good; returns their scores' exponents.

        None is a layer that no path goes through; its exponent is 0.
        """
        exponents = torch.zeros(len(visits), dtype=torch.int64, device=self.device)
        never = Term(self._arena[:0], self.table.slot())
        terms = [term for v in visits for term in ((v.x, v.g) if v else (never, never))]
        once = {t.values.data_ptr(): t for t in terms if t is not never}
        self.table.add(Instruction(table.EXPONENTS, terms=terms, data=self._hold(exponents)))
        self.table.add(Instruction(table.NORMALISE, terms=list(once.values())))
        return exponents

    def record(self) -> None:
        """Write the record of the round."""
        slots = self._weight_slots + self._back_slots
        nothing = self._arena[:0]
        terms = [Term(nothing, slot, index) for index, slot in slots]
        self.table.add(Instruction(table.RECORD, terms=terms, channels=len(self._weight_slots)))

    def check_bits(self, masks: Sequence[Tensor]) -> None:
        """Note the first layer without a weight."""
        terms = [Term(mask, -1, mask.numel()) for mask in masks]
        self.table.add(Instruction(table.BITS, terms=terms, data=self.table.record_field("empty")))


def stored_geometry(step: kinds.Weight, weight: Tensor, x: Tensor, g: Tensor) -> tuple[int, ...]:
    """The 22 numbers of a product with the stored matrix, `x` and `g` its maps."""
    if step.kind == "linear":
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    shapes = iter((*step.stride, *step.padding, *step.dilation, step.groups))
    return geometry(weight, x, g, shapes)


def can_run(flow: Flow, state: State) -> bool:
    """Whether the device sweeps can run this.

    They need float32 maps of at least one element, powers of two, and weights of a type that is
    read.
    """
    if flow.dtype != torch.float32 or flow.by_input_max:
        return False
    flow.bind(state)
    read = [state[step.parameter] for step in flow.graph.weights]
    if any(math.prod(w.shape) == 0 for w in read):
        return False
    if flow.semantics.power and any(w.is_meta or table.weight_type(w.dtype) is None for w in read):
        return False
    return all(math.prod(shape) > 0 for shape in shapes_of(flow).values())


__all__ = ["DeviceProgram", "Visit", "can_run", "stored_geometry"]
