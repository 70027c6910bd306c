"""Tables of instructions for device sweeps (csrc/cuda/flow.cuh), and how they are started.

A table is written once, with tensors for maps and numbers for slots; `finish` uploads it. After
that a run of instructions is one launch, or one each where the layers are large, and nothing comes
back to the host: a CUDA graph can hold a whole round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from paikern.backends import cuda_launch, cuda_path
from paikern.backends.cuda_launch import THREADS, Step
from paikern.backends.cuda_layers import TYPES, one_vector

__all__ = [
    "Dpai",
    "FlowTable",
    "Instruction",
    "Product",
    "Record",
    "Term",
    "one_vector",
    "weight_type",
]

(RESET, FILL, FORWARD, ADJOINT, JOIN, NORMALISE, SCALE, MEAN, SPREAD, POOL, UNPOOL, TOTAL, RECORD,
 EXPONENTS, BITS, SCORE, LIVE, DPAI, SWEEP, RECTIFY, UNRECTIFY) = range(21)  # fmt: skip
# Numbers in a PaikernProduct, a PaikernTerm, a PaikernScale, a PaikernDpai, a PaikernFlowStep.
_PRODUCT, _TERM, _SLOT, _DPAI = 15, 4, 2, 20
_ROW = 21 + _PRODUCT
_FIELDS = 9  # of a PaikernFlowRecord
_FLAT = 1024  # scores that a block updates at a time
_EACH = 4  # elements of a map that a thread takes
# How a product is called in `cuda_path.workspace` and `cuda_path.kernel`.
_WAYS = {
    FORWARD: ("forward", "forward"),
    ADJOINT: ("adjoint", "backward"),
    SWEEP: ("adjoint", "sweep"),
    SCORE: ("score", "score"),
}
# A multiprocessor holds one block of `paikern_flow`, which has the registers of every instruction.
# Products of more multiplications than these, and passes that keep a multiprocessor busy for more
# than two turns, are launched by themselves, on as many blocks as they want. Not yet measured.
_SMALL_MAPS, _SMALL_MATRIX = 1 << 24, 1 << 20
_BLOCKS_TOGETHER, _TURNS = 1, 2


def weight_type(dtype: torch.dtype) -> int | None:
    """The code of a weight's dtype, None where no kernel reads it."""
    return TYPES.get(dtype)


class Term(NamedTuple):
    """A map that an instruction reads, with the slot of its power of two; -1 for none."""

    values: Tensor
    slot: int = -1
    numel: int = 0
    to: Tensor | None = None


@dataclass
class Product:
    """A weight step: the stored weight and the maps of its columns (x) and rows (g).

    `masks` holds one packed mask for each parity of the round, or is empty.
    """

    weight: Tensor | None
    power: int
    masks: tuple[Tensor, ...]
    first_bit: int
    geometry: tuple[int, ...]
    x: Tensor
    g: Tensor
    x_slot: int = -1
    g_slot: int = -1
    top_slot: int = -1

    def of_masks(self) -> Product:
        """The same maps, of ones: its score is the gradient of the mask."""
        return replace(self, weight=None, power=0, masks=(), first_bit=0)


class Dpai(NamedTuple):
    """The update of a layer, or of the rows of it that a step uses (PaikernDpai).

    `q` is None where both maps are vectors; `rule` and `q_scale` are read at every step.
    """

    s: Tensor
    m: Tensor | None
    v: Tensor | None
    mask: Tensor
    first_bit: int
    q: Tensor | None
    x: Term
    g: Term
    live: Tensor
    rule: Tensor
    q_scale: Tensor
    found: int
    rows: int
    columns: int
    taps: int
    groups: int
    transposed: bool


@dataclass
class Instruction:
    kind: int
    out: Tensor | None = None
    slot: int = -1
    source: int = -1  # the slot whose exponent `slot` gets
    terms: Sequence[Term] = ()
    first: int = 0
    last: int = 0
    outer: int = 1
    channels: int = 1
    inner: int = 1
    factor: Tensor | None = None
    offset: Tensor | None = None
    pool: Sequence[int] = ()
    places: Tensor | None = None
    data: Tensor | int | tuple[int, ...] = 0  # a tuple: for each parity
    average: bool = False
    product: Product | None = None
    dpai: Dpai | None = None

    def need(self) -> cuda_path.Workspace:
        """What the product of this instruction takes."""
        p = self.product
        assert p is not None
        dtype = torch.float32 if p.weight is None else p.weight.dtype
        return cuda_path.workspace(_WAYS[self.kind][0], p.geometry, dtype, p.power)

    def is_small(self) -> bool:
        """Whether a kernel that goes through several instructions may take this one."""
        if self.kind == SWEEP:
            return False
        if self.product is None:
            return True
        g = self.product.geometry
        depth = g[2] // g[3] * math.prod(g[7:10])
        most = _SMALL_MATRIX if one_vector(g) else _SMALL_MAPS
        return g[0] * g[1] * depth * math.prod(g[19:22]) <= most

    def blocks(self) -> int:
        """How many blocks have something to do."""
        if self.product is not None:
            return max(1, self.need().blocks)
        if self.dpai is not None:
            return max(1, -(-self.dpai.s.numel() // _FLAT))
        if self.kind == LIVE:
            return max(1, -(-self.channels // 8))
        if self.kind == BITS:
            return max(1, len(self.terms))
        if self.kind in (RESET, TOTAL, RECORD, EXPONENTS):
            return 1
        count = self.out.numel() if self.out is not None else 0
        if self.kind == NORMALISE:
            count = max((term.values.numel() for term in self.terms), default=0)
        return max(1, -(-count // (THREADS * _EACH)))


class Record(NamedTuple):
    """What a round leaves for the host; the numbers of PaikernFlowRecord."""

    mantissa: float
    top: int
    dead: int
    broken: int
    empty: int
    nodes: int
    weights: int
    kernels: int
    faults: int


class FlowTable:
    """Instructions, and where they keep what they share.

    Args:
        like: any tensor on the device.
        rounds: how many records there is room for.
        counts: values are whole numbers, see `paikern.pathgraph.flow`.
    """

    def __init__(self, like: Tensor, rounds: int, counts: bool) -> None:
        self.like = like
        self.instructions: list[Instruction] = []
        self.counts = counts
        self.records = like.new_zeros((rounds + 1, _FIELDS), dtype=torch.int64)
        self._round = like.new_full((1,), -1, dtype=torch.int64)
        self._arrived = like.new_zeros(2, dtype=torch.int64)
        self._slots = 0
        self._tables: list[Tensor] = []
        self._numbers: list[list[int]] = []
        self._held: list[object] = []

    def slot(self) -> int:
        """A new slot for the power of two of a map; zero at the beginning of every round."""
        self._slots += 1
        return self._slots - 1

    def add(self, instruction: Instruction) -> int:
        """Append; returns the number of the instruction."""
        self.instructions.append(instruction)
        return len(self.instructions) - 1

    def record_field(self, name: str) -> int:
        """The address of a field of the record of the round at hand."""
        return self.records.data_ptr() + 8 * Record._fields.index(name)

    def finish(self, parities: int) -> None:
        """Upload one table for each parity of the rounds."""
        slots = self.like.new_zeros(max(1, self._slots) * _SLOT, dtype=torch.int64)
        floats, counters = 0, 0
        for step in self.instructions:
            if step.product is not None:
                need = step.need()
                floats, counters = max(floats, need.floats), max(counters, need.counters)
        partial = self.like.new_empty(max(1, floats), dtype=torch.float32)
        arrived = self.like.new_zeros(max(1, counters), dtype=torch.int32)
        self._held += [slots, partial, arrived]
        self._spaces = slots, partial, arrived
        self._tables = [self._table(parity) for parity in range(parities)]
        self.restart()

    def restart(self) -> None:
        """Begin again with the first round."""
        self._round.fill_(-1)

    def _slot_at(self, slot: int) -> int:
        return 0 if slot < 0 else self._spaces[0].data_ptr() + 8 * _SLOT * slot

    def _table(self, parity: int) -> Tensor:
        terms = [term for step in self.instructions for term in step.terms]
        extra = [n for step in self.instructions for n in step.pool]
        extra += [n for s in self.instructions if s.product for n in s.product.geometry]
        extra += [n for s in self.instructions if s.dpai for n in self._update(s.dpai)]
        first_term = _ROW * len(self.instructions)
        first_extra = first_term + _TERM * len(terms)
        table = self.like.new_empty(first_extra + len(extra), dtype=torch.int64)
        base = table.data_ptr()
        numbers: list[int] = []
        term_at, extra_at = base + 8 * first_term, base + 8 * first_extra
        geometry_at = extra_at + 8 * sum(len(s.pool) for s in self.instructions)
        updates_at = geometry_at + 8 * sum(
            len(s.product.geometry) for s in self.instructions if s.product
        )
        for step in self.instructions:
            numbers += self._row(step, parity, term_at, extra_at, geometry_at, updates_at)
            term_at += 8 * _TERM * len(step.terms)
            extra_at += 8 * len(step.pool)
            geometry_at += 8 * len(step.product.geometry) if step.product else 0
            updates_at += 8 * _DPAI if step.dpai else 0
        for term in terms:
            to = term.values if term.to is None else term.to
            numbers += [term.values.data_ptr(), self._slot_at(term.slot),
                        term.numel or term.values.numel(), to.data_ptr()]  # fmt: skip
        table.copy_(torch.tensor(numbers + extra))
        self._numbers.append(numbers)
        return table

    def _update(self, d: Dpai) -> list[int]:
        return [
            *map(_at, (d.s, d.m, d.v, d.mask)),
            d.first_bit,
            *map(_at, (d.q, d.x.values, d.g.values)),
            self._slot_at(d.x.slot),
            self._slot_at(d.g.slot),
            *map(_at, (d.live, d.rule, d.q_scale)),
            d.found,
            d.rows,
            d.columns,
            d.taps,
            d.groups,
            int(d.transposed),
            int(self.counts),
        ]

    def _row(
        self, step: Instruction, parity: int, terms: int, pool: int, geometry: int, update: int
    ) -> list[int]:
        reset = step.kind == RESET
        row = [
            step.kind,
            _at(step.out),
            self._slots if reset else step.out.numel() if step.out is not None else 0,
            self._slot_at(0 if reset else step.slot),
            self._slot_at(step.source),
            terms,
            len(step.terms),
            step.first,
            step.last,
            step.outer,
            step.channels,
            step.inner,
            _at(step.factor),
            _at(step.offset),
            pool,
            _at(step.places),
            update if step.dpai else _address(step.data, parity),
            self._round.data_ptr(),
            self.records.data_ptr(),
            int(self.counts),
            int(step.average),
        ]
        if step.product is None:
            return [*row, *(0,) * _PRODUCT]
        return [*row, *self._product(step, step.product, parity, geometry)]

    def _product(self, step: Instruction, p: Product, parity: int, geometry: int) -> list[int]:
        return [
            _at(p.weight),
            0 if p.weight is None else TYPES[p.weight.dtype],
            p.power,
            p.masks[parity].data_ptr() if p.masks else 0,
            p.first_bit,
            geometry,
            p.x.data_ptr(),
            p.g.data_ptr(),
            self._slot_at(p.x_slot),
            self._slot_at(p.g_slot),
            self._slot_at(p.top_slot),
            self._spaces[1].data_ptr(),
            self._spaces[2].data_ptr(),
            int(self.counts),
            self._slot_at(step.source),
        ]

    def _alone(self, parity: int, index: int) -> Step:
        """The launch of one instruction: for products the kernel of the operation."""
        step, table = self.instructions[index], self._tables[parity].data_ptr()
        p, blocks = step.product, step.blocks()
        if p is None or step.kind == SWEEP:
            kernel = "paikern_flow_dpai" if step.kind == DPAI else "paikern_flow_small"
            if p is not None and p.weight is not None:
                kernel = f"paikern_flow_sweep_{8 * p.weight.element_size()}"
            return Step(kernel, blocks, (table, index))
        dtype = torch.float32 if p.weight is None else p.weight.dtype
        kernel = cuda_path.kernel(_WAYS[step.kind][1], p.geometry, dtype, p.power)
        row = self._numbers[parity][index * _ROW : (index + 1) * _ROW]
        more = (0.0, _at(step.out)) if step.kind == SCORE else ()
        return Step(kernel, blocks, (*row[-_PRODUCT:], *more))

    def steps(self, parity: int, first: int, last: int) -> list[Step]:
        """The launches of instructions [first, last)."""
        table = self._tables[parity].data_ptr()
        arrived = self._arrived.data_ptr()
        together = cuda_launch.together(self.like, _BLOCKS_TOGETHER)
        wanted = [self.instructions[i].blocks() for i in range(first, last)]
        joins = [
            self.instructions[i].is_small() and wanted[i - first] <= _TURNS * together
            for i in range(first, last)
        ]
        made: list[Step] = []
        at = first
        while at < last:
            end = at
            while end < last and joins[end - first]:
                end += 1
            if end > at + 1:
                blocks = min(together, max(wanted[at - first : end - first]))
                made.append(Step("paikern_flow", blocks, (table, at, end, arrived)))
            else:
                end = at + 1
                made.append(self._alone(parity, at))
            at = end
        return made

    def run(self, parity: int, first: int, last: int) -> None:
        """Start instructions [first, last)."""
        cuda_launch.run(self.like, self.steps(parity, first, last))

    def rounds_done(self) -> int:
        """Rounds since the last start; waits for the device."""
        return int(self._round) + 1

    def read(self, first: int, last: int) -> list[Record]:
        """The records of rounds [first, last); waits for the device."""
        rows = self.records[1 + first : 1 + last].cpu()
        mantissa = rows[:, 0].contiguous().view(torch.float64).tolist()
        return [Record(m, *row[1:]) for m, row in zip(mantissa, rows.tolist(), strict=True)]


def _address(place: Tensor | int | tuple[int, ...], parity: int) -> int:
    if isinstance(place, tuple):
        return place[parity]
    return place if isinstance(place, int) else place.data_ptr()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
