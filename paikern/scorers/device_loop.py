"""Rounds of a path method on a GPU: sweeps, exact selection and masks, replayed from a CUDA graph.

Nothing in a round waits for the host or copies to it. What each round found lies in a record on the
device, which is read every now and then for the progress, and to stop where a network is dead.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from paikern import ops
from paikern.backends import cuda_launch, registry
from paikern.backends.cuda_flow import SCORE, SWEEP, Instruction, Record, one_vector
from paikern.backends.cuda_graph import Replay
from paikern.backends.cuda_layers import Layer, path_layer
from paikern.backends.cuda_select import SelectionPlan, new_stream
from paikern.errors import NonFiniteScoreError, PaikernError
from paikern.pathgraph import Flow
from paikern.pathgraph.device_program import DeviceProgram, Visit, can_run
from paikern.pathgraph.flow import device_of
from paikern.pathgraph.steps import Weight
from paikern.scorers.base import Run

# Between two looks at the records: long enough that waiting costs little beside the rounds, short
# enough for Ctrl-C and the progress.
_SECONDS_A_BATCH = 0.1
# A selection that makes a score again adds up its products one by one, for the sample, the filter
# and the ties; from so many on, tiles of products that are stored cost less. Not yet measured.
SCORES_STORED_FROM = 17
# Weights of a matrix from which on the sweep back meets its scores: a read of them is saved,
# against two bits a weight and a kernel of its own. Not yet measured.
MET_FROM = 1 << 20


class DeviceLoop:
    """The rounds of one run; made by `device_loop`.

    Args:
        run: its `masks` are set after every batch of rounds.
        power: of the score.
        dead: makes the error where no path is left, from words on where they end.
    """

    def __init__(
        self, run: Run, flow: Flow, power: int, dead: Callable[[str], PaikernError]
    ) -> None:
        # A fused projection, whose rows are used by several steps, is ranked by those rows, which
        # is the same only where one number is kept over all layers.
        self.one_budget = any(len(uses) > 1 for uses in flow.graph.uses().values())
        self.run, self._flow, self._power, self._dead = run, flow, power, dead
        self._provider = provider_of(device_of(run.state))
        device = device_of(run.state)
        self._masks = {
            name: tuple(_full(shape, device) for _ in range(2))
            for name, shape in run.shapes.items()
        }
        self._done = 0

    def rounds(self, counts: Sequence[Sequence[int]], stop_empty: bool) -> Iterator[float]:
        """Run all rounds; yields log R of each. As `PathLoop.rounds`."""
        with cuda_launch.provided(self._provider), torch.no_grad():
            self._prepare(counts)
        yield from self._batches(len(counts), stop_empty)

    @property
    def masks(self) -> dict[str, Tensor]:
        return {name: pair[self._done % 2] for name, pair in self._masks.items()}

    def _prepare(self, counts: Sequence[Sequence[int]]) -> None:
        program = DeviceProgram(self._flow, self.run.state, self._masks, "scores", len(counts))
        self._program = program
        by_name: dict[str, list[Visit | None]] = {name: [] for name in self.run.layers}
        for visit in program.visits:
            if visit.step.parameter in by_name:
                by_name[visit.step.parameter].append(visit)
        parts: list[tuple[str, Visit | None]] = []
        for name, visits in by_name.items():
            # A layer that no path goes through has no maps; its weights score 0.
            visits.sort(key=lambda v: v.product.first_bit if v else 0)
            parts += [(name, visit) for visit in visits or [None]]
        self._names = [name for name, _ in parts]
        exponents = program.keep_maps([visit for _, visit in parts])
        self._scores = [self._stored(visit) for _, visit in parts]
        k = exponents.new_zeros(len(counts[0]))
        planned = torch.tensor(counts, dtype=torch.int64).to(exponents.device)
        program.per_round.append((planned, k))
        inside = [self._inside(visit, len(counts[0])) for _, visit in parts]
        streams = any(bits is not None for bits in inside) and len(parts) > 1
        self.stream = new_stream(exponents) if streams else None
        self._swept = len(program.table.instructions)
        for parity in range(2):
            program.check_bits([pair[parity] for pair in self._masks.values()])
        program.record()
        self._plans = [
            SelectionPlan(
                [
                    self._layer(i, *part, parity)._replace(inside=inside[i] if streams else None)
                    for i, part in enumerate(parts)
                ],
                k,
                exponents,
                stream=self.stream,
            )
            for parity in range(2)
        ]
        for layer, (_, met) in enumerate(parts):
            if met is not None and streams and inside[layer] is not None:
                adjoint = program.adjoints[met.number]
                adjoint.kind, adjoint.terms, adjoint.inner = SWEEP, (met.x,), layer
                adjoint.data = tuple(plan.address for plan in self._plans)
        program.finish()
        self._replays = [
            Replay(functools.partial(self._round, parity), exponents) for parity in range(2)
        ]

    def _inside(self, visit: Visit | None, rankings: int) -> Tensor | None:
        """A place for the bits of scores that the sweep back is to meet, or None."""
        if visit is None or rankings > 1 or visit.number not in self._program.adjoints:
            return None
        p = visit.product
        assert p.weight is not None
        if self._power != p.power or not one_vector(p.geometry):
            return None
        if self._flow.semantics.offsets:  # scores may be negative
            return None
        if p.weight.shape[1] % 8 or p.weight.numel() < MET_FROM:
            return None
        return p.weight.new_empty(p.weight.numel() // 8, dtype=torch.uint8)

    def _stored(self, visit: Visit | None) -> Tensor | None:
        """A place for the scores of a layer, where making them again costs more than reading."""
        if visit is None or positions(visit.product.geometry) < SCORES_STORED_FROM:
            return None
        # By then both maps lie in [1, 2): nothing is to be taken out when they are read.
        product = replace(visit.product, power=self._power, masks=(), x_slot=-1, g_slot=-1)
        assert product.weight is not None
        scores = product.weight.new_empty(product.weight.numel(), dtype=torch.float32)
        self._program.table.add(Instruction(SCORE, scores, product=product))
        return scores

    def _layer(self, index: int, name: str, visit: Visit | None, parity: int) -> Layer:
        now, then = self._masks[name][parity], self._masks[name][1 - parity]
        if visit is None:
            nothing = torch.zeros(self.run.shapes[name], device=now.device)
            return Layer(0, nothing, then, candidates=now)
        weight = visit.product.weight
        assert weight is not None
        first = visit.product.first_bit // 8
        part = slice(first, first + (weight.numel() + 7) // 8)
        if (scores := self._scores[index]) is not None:
            return Layer(0, scores, then[part], candidates=now[part])
        maps = visit.x.values, visit.g.values
        return path_layer(weight, *maps, visit.product.geometry, self._power, now[part], then[part])

    def _round(self, parity: int) -> None:
        written = self._swept + 1 - parity
        self._program.run(parity, 0, 1)
        self._plans[parity].forecast()
        self._program.run(parity, 1, self._swept)
        self._plans[parity].launch()
        self._program.run(parity, written, written + 1)
        self._program.run(parity, self._swept + 2)

    def _batches(self, count: int, stop_empty: bool) -> Iterator[float]:
        # A round that empties a layer is the last one, and its masks are to be seen.
        size = 1 if stop_empty else 2
        while self._done < count:
            first, last = self._done, min(self._done + size, count)
            started = time.perf_counter()
            with cuda_launch.ALONE, cuda_launch.provided(self._provider):
                for number in range(first, last):
                    self._replays[number % 2]()
                records = self._program.table.read(first, last)
            if not stop_empty and time.perf_counter() - started < _SECONDS_A_BATCH / 2:
                size *= 2
            self._done = last
            self.run.masks = self.masks
            if last == count:
                for replay in self._replays:
                    self.run.notes.extend(replay.note("rounds"))
            for record in records:
                self._check(record)
                if record is records[-1]:
                    self._refuse_nan()
                yield log_total(record)
                if stop_empty and record.empty >= 0:
                    return

    def _check(self, record: Record) -> None:
        if record.broken >= 0:
            raise self._program.overflow(record.broken)
        if not record.mantissa > 0:
            index = record.dead
            raise self._dead(f" (none gets past {self._program.name(index)})" if index >= 0 else "")

    def _refuse_nan(self) -> None:
        found = [layer for plan in self._plans if (layer := plan.nan_layer()) >= 0]
        if found:
            layer = min(found)
            raise NonFiniteScoreError(
                f"scores of {self._names[layer]} hold NaN: weights and path counts "
                "overflow there; check that parameter"
            )


def _full(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return ops.pack_mask(torch.ones(shape, dtype=torch.bool, device=device))


def positions(geometry: Sequence[int]) -> int:
    """How many products a score of this layer adds up."""
    return geometry[0] * math.prod(geometry[19:22])


def log_total(record: Record) -> float:
    """log R of a round."""
    if not record.mantissa > 0:
        return -math.inf
    return math.log(record.mantissa) + record.top * math.log(2.0)


def provider_of(device: torch.device) -> cuda_launch.Provider:
    """Where the kernels of the backend for this device come from."""
    return registry.resolve("kernel_provider", device.type, False)()


def device_loop(
    run: Run, flow: Flow, power: int, dead: Callable[[str], PaikernError]
) -> DeviceLoop | None:
    """The loop for a run, or None where a layer has scores that add up over several uses."""
    device = device_of(run.state)
    if not registry.has("kernel_provider", device.type):
        return None
    uses = flow.graph.uses()
    if not all(_apart(uses.get(name, ()), run.shapes[name]) for name in run.layers):
        return None
    if not flow.semantics.power or not can_run(flow, run.state):
        return None
    return DeviceLoop(run, flow, power, dead)


def _apart(uses: Sequence[Weight], shape: tuple[int, ...]) -> bool:
    """Whether every weight of a parameter belongs to one step at most."""
    if any(step.rows is None for step in uses):
        return len(uses) == 1
    if not uses:
        return True
    rows = sorted(step.rows for step in uses if step.rows is not None)
    ends = [0, *(stop for _, stop in rows)]
    joined = all(start == end for (start, _), end in zip(rows, ends, strict=False))
    bits = math.prod(shape[1:])  # masks are read and written by words
    return joined and ends[-1] == shape[0] and all(end * bits % 32 == 0 for end in ends[:-1])
