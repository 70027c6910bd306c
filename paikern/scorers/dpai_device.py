"""DPaI steps on a GPU: sweeps, fused updates and selection, replayed from a CUDA graph.

The rule of every step (Adam's bias corrections) lies on the device before the first; what a step
found is read from there every now and then. Only `patience` looks at the mask after each step.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paikern.backends import cuda_flow as table
from paikern.backends import cuda_launch, registry
from paikern.backends.cuda_flow import Dpai, Instruction, Record
from paikern.backends.cuda_graph import Replay
from paikern.backends.cuda_layers import Layer
from paikern.backends.cuda_select import SelectionPlan
from paikern.pathgraph.device_program import DeviceProgram, Visit, can_run
from paikern.pathgraph.flow import device_of
from paikern.pathgraph.steps import Weight
from paikern.scorers.device_loop import log_total, provider_of

if TYPE_CHECKING:
    from paikern.scorers.dpai_trainer import DPaITrainer, StepStatistics

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's, as in the published program
_RULE = 8  # floats of a PaikernDpaiRule
_SECONDS_A_BATCH = 0.1
_AT_ONCE = 512  # steps whose rules are on the device


class DeviceSteps:
    """The steps of one trainer; made by `device_steps`."""

    def __init__(self, trainer: DPaITrainer) -> None:
        self.trainer = trainer
        self._provider = provider_of(device_of(trainer.run.state))
        like = next(iter(trainer.s.values()))
        self._q = like.new_empty(max(s.numel() for s in trainer.s.values()))
        self._index = {name: i for i, name in enumerate(trainer.s)}
        self._rules = like.new_zeros((_AT_ONCE, len(trainer.s), _RULE))
        self._rule = like.new_zeros((len(trainer.s), _RULE))
        self._scales: list[Tensor] = []
        self._base = 0  # steps done before the rules that are on the device
        self._read = 0  # steps of those whose records are in the history
        with cuda_launch.provided(self._provider), torch.no_grad():
            masks = {name: (mask,) for name, mask in trainer.masks.items()}
            self.program = DeviceProgram(
                trainer.flow, trainer.run.state, masks, "nodes", _AT_ONCE, self._visit, 1
            )
            words = self._rules.view(torch.int64), self._rule.view(torch.int64)
            self.program.per_round.append(words)
            self.program.record()
            self.program.finish()
            self._plan = SelectionPlan(
                [Layer(0, s, trainer.masks[name], absolute=True) for name, s in trainer.s.items()],
                trainer.kept,
            )
        self._replay = Replay(self._step, like)

    def select(self) -> None:
        """The masks of the scores as they are."""
        with cuda_launch.provided(self._provider):
            self._plan.launch()
        self._refuse(self._plan.nan_layer() >= 0)

    def train(self, steps: int, patience: int) -> Iterator[StepStatistics]:
        yield from self._train(steps, patience)
        self.trainer.run.notes.extend(self._replay.note("steps"))

    def _train(self, steps: int, patience: int) -> Iterator[StepStatistics]:
        t = self.trainer
        last, size = t.steps + steps, 1 if patience else 2
        while t.steps < last:
            self._load_rules()
            count = min(size, last - t.steps, _AT_ONCE - self._read)
            before = {name: mask.clone() for name, mask in t.masks.items()} if patience else {}
            started = time.perf_counter()
            first = t.steps
            with cuda_launch.ALONE, cuda_launch.provided(self._provider):
                for _ in range(count):
                    # An interrupt in the middle of a step leaves scores of no step.
                    t.whole = False
                    self._replay()
                    t.whole = True
                broken = self._settle()
            if not patience and time.perf_counter() - started < _SECONDS_A_BATCH / 2:
                size *= 2
            if patience and not broken:
                same = all(torch.equal(before[name], mask) for name, mask in t.masks.items())
                t.unchanged = t.unchanged + 1 if same else 0
            yield from t.history[first:]
            if broken is not None:
                self._raise(broken)
            self._refuse(self._plan.nan_layer() >= 0)
            if patience and t.unchanged >= patience:
                return

    def settle(self) -> None:
        """Count the steps that an interrupt left uncounted."""
        self._settle()

    # --- the program ---------------------------------------------------------------------------

    def _visit(self, program: DeviceProgram, v: Visit) -> None:
        """Which nodes are alive, the gradient of the mask, and the update."""
        name = v.step.parameter
        t = self.trainer
        if name not in t.s:
            return
        s, add, product = t.s[name], program.table.add, v.product
        out = v.y.values
        linear = v.step.kind == "linear"
        channels = out.shape[-1] if linear else out.shape[1]
        outer = math.prod(out.shape[:-1]) if linear else out.shape[0]
        live = torch.empty(channels, dtype=torch.uint8, device=s.device)
        scale = s.new_empty(1)
        self._scales += [live, scale]
        x, g = (v.g, v.x) if v.step.transposed else (v.x, v.g)
        add(
            Instruction(
                table.LIVE, scale, terms=(v.y, g, x), outer=outer, channels=channels,
                inner=math.prod(out.shape) // (outer * channels), places=live,
                data=program.table.record_field("nodes"),
            )
        )  # fmt: skip
        rows = s if v.step.rows is None else s[slice(*v.step.rows)]
        part = slice(product.first_bit, product.first_bit + rows.numel())
        taps = math.prod(rows.shape[2:])
        q = None
        if taps > 1 or not table.one_vector(product.geometry):
            q = self._q[: rows.numel()]
            add(Instruction(table.SCORE, q, product=product.of_masks()))
        m, v_ = (held[name].view(-1)[part] if held else None for held in (t.m, t.v))
        add(
            Instruction(
                table.DPAI,
                dpai=Dpai(
                    s.view(-1)[part], m, v_, t.masks[name], product.first_bit, q, v.x, v.g, live,
                    self._rule[self._index[name]], scale, program.table.record_field("weights"),
                    rows.shape[0], rows.shape[1], taps, v.step.groups, v.step.transposed,
                ),
            )
        )  # fmt: skip

    def _step(self) -> None:
        self.program.run(0)
        self._plan.launch()

    def _load_rules(self) -> None:
        """Rules of the next steps, where those on the device are used up or of another start."""
        t = self.trainer
        if self._base + self._read == t.steps and 0 < self._read < _AT_ONCE:
            return
        self._base, self._read = t.steps, 0
        self._rules.copy_(rules(t, t.steps + 1, _AT_ONCE))
        self.program.table.restart()

    # --- what steps found ------------------------------------------------------------------------

    def _settle(self) -> Record | None:
        """Bring the records of finished steps into the history; the one that went wrong, if any."""
        t = self.trainer
        done = self.program.table.rounds_done()
        records = self.program.table.read(self._read, done)
        t.steps = self._base + self._read
        for record in records:
            if record.broken >= 0 or not record.mantissa > 0 or record.faults:
                self._read = _AT_ONCE  # nothing goes on from here
                return record
            self._read += 1
            t.steps += 1
            t.history[t.steps - 1 :] = [_statistics(t.steps, record)]
        t.mark_selected()
        return None

    def _raise(self, record: Record) -> None:
        t = self.trainer
        if record.broken >= 0:
            raise self.program.overflow(record.broken)
        if not record.mantissa > 0:
            name = f" (none gets past {self.program.name(record.dead)})"
            raise t.dead(t.steps + 1, name if record.dead >= 0 else "")
        t.steps += 1
        self._refuse(True)

    def _refuse(self, wrong: bool) -> None:
        if not wrong:
            return
        scores = self.trainer.s
        updated = [v.step.parameter for v in self.program.visits]  # in the order of the sweep back
        for name in dict.fromkeys((*updated, *scores)):
            if name in scores and not bool(torch.isfinite(scores[name]).all()):
                raise self.trainer.not_finite(name)


def _statistics(step: int, record: Record) -> StepStatistics:
    from paikern.scorers.dpai_trainer import StepStatistics

    return StepStatistics(step, log_total(record), record.nodes, record.kernels, record.weights)


def rules(trainer: DPaITrainer, first: int, count: int) -> Tensor:
    """`[count, layers, 8]` float32: PaikernDpaiRule of steps `first`, `first` + 1, ..."""
    settings = trainer.settings
    effective = 1.0 - settings.alpha
    dead = effective + settings.alpha * settings.beta
    adam = settings.optimizer == "adam"
    t = torch.arange(first, first + count, dtype=torch.float64)
    correction = 1.0 - _BETA1**t if adam else torch.ones_like(t)
    root = (1.0 - _BETA2**t) ** -0.5
    lr = torch.tensor(list(trainer.lr.values()), dtype=torch.float64)
    found = torch.empty(count, len(lr), _RULE, dtype=torch.float64)
    found[..., 0], found[..., 1] = dead, effective
    found[..., 2] = lr / correction[:, None]
    found[..., 3], found[..., 4], found[..., 6], found[..., 7] = _BETA1, _BETA2, _EPSILON, 0.0
    found[..., 5] = root[:, None]
    return found.float()


def device_steps(trainer: DPaITrainer) -> DeviceSteps | None:
    """The steps by device sweeps, or None where a parameter is used in a way they do not know."""
    device = device_of(trainer.run.state)
    if not registry.has("kernel_provider", device.type):
        return None
    if not can_run(trainer.flow, trainer.run.state):
        return None
    if not all(_apart(trainer.uses.get(name, ())) for name in trainer.s):
        return None
    if any(s.dtype != torch.float32 or s.numel() == 0 for s in trainer.s.values()):
        return None
    return DeviceSteps(trainer)


def _apart(uses: Sequence[Weight]) -> bool:
    """Whether every weight of a parameter belongs to one step at most."""
    if len(uses) == 1:
        return uses[0].rows is None or not uses[0].transposed
    if any(step.rows is None or step.transposed for step in uses):
        return False
    rows = sorted(step.rows for step in uses if step.rows is not None)
    return all(stop <= start for (_, stop), (start, _) in itertools.pairwise(rows))
