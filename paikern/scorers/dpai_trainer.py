"""The state of a DPaI run and its steps, native where they can be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paikern import ops
from paikern.backends import registry
from paikern.errors import PaikernError
from paikern.pathgraph import Program, Semantics, Visit, compiled, weights
from paikern.pathgraph.flow import device_of
from paikern.scorers.base import Run
from paikern.scorers.dpai_device import DeviceSteps, device_steps
from paikern.scorers.dpai_nodes import Revival, hold_nodes
from paikern.scorers.random import normal_scores
from paikern.scores import Dense, Scores

if TYPE_CHECKING:
    from paikern.scorers.dpai import DPaI

# Long enough that Python costs nothing beside the steps, short enough for Ctrl-C and the progress.
_SECONDS_A_CALL = 0.1


@dataclass(frozen=True)
class StepStatistics:
    """One step, on the mask before its update. `objective` is log R_P, or J where published."""

    step: int
    objective: float
    nodes: int
    kernels: int
    params: int
    published: bool = False

    def values(self) -> dict[str, float]:
        """As shown by the progress bar and kept in the history; J is no path count.

        A network without any path, which `revive` may bring back, has no logarithm to show.
        """
        name = "objective" if self.published else "log_paths"
        alive = {} if self.objective == -math.inf else {name: self.objective}
        return {
            **alive,
            "effective_nodes": self.nodes,
            "effective_kernels": self.kernels,
            "effective_params": self.params,
        }


class DPaITrainer:
    """The state of a DPaI run: scores, Adam moments, the current mask, the number of steps.

    Args:
        run: model tensors, layers and seed.
        settings: with every default filled in (`DPaI.resolved`).
        kept: number of weights each layer keeps, in layer order.
    """

    def __init__(self, run: Run, settings: DPaI, kept: list[int]) -> None:
        self.run = run
        self.settings = settings
        self.kept = kept
        self.kept_of = dict(zip(run.layers, kept, strict=True))
        self.published = run.variant == "published"
        self.s = _start(run, settings.init_scores)
        self.uses = run.graph.uses()
        if settings.keep_nodes:
            hold_nodes(run, self.s, kept, self.uses)
        # Drawn on the CPU, so that a seed gives the same scores everywhere; trained on the device.
        device = device_of(run.state)
        self.s = {name: s.to(device) for name, s in self.s.items()}
        adam = settings.optimizer == "adam"
        self.m = {n: torch.zeros_like(s) for n, s in self.s.items()} if adam else {}
        self.v = {n: torch.zeros_like(s) for n, s in self.s.items()} if adam else {}
        assert settings.lr is not None
        # Ascent: |q| is about 1 / k_l, so that a step is scaled by the number kept.
        self.lr = {n: settings.lr * (1 if adam else k) for n, k in zip(self.s, kept, strict=True)}
        self.steps = 0
        # Written in place by every native selection.
        self.masks = {
            n: ops.pack_mask(torch.zeros_like(s, dtype=torch.bool)) for n, s in self.s.items()
        }
        self._selected_at = -1
        # Thresholds move little from step to step: that halves the time of a small layer.
        start = next(iter(self.s.values()))
        self.memory = start.new_full((len(self.s), 2), math.nan, dtype=torch.float64)
        self.flow = run.flow(
            Semantics(power=0), rescale="input_max" if self.published else "exponent"
        )
        # Maps of one sweep need no state but the device: no weight value is ever read.
        self._revival = Revival(run) if settings.revive else None
        self._on_path: dict[str, Tensor] = {}  # of weights with several uses, while reviving
        self._native = None if settings.revive else _native(self)
        self.unchanged = 0
        self.history: list[StepStatistics] = []
        self.whole = True  # no step was broken off halfway
        self.select()

    def restore(self, history: list[StepStatistics], unchanged: int) -> None:
        """Go on after these steps with the scores and moments that were put in place."""
        self.steps, self.history, self.unchanged = len(history), history, unchanged
        self._selected_at = -1
        self.select()

    def settle(self) -> None:
        """Count steps that an interrupt left uncounted: the scores are theirs already."""
        if self._native is not None:
            self._native.settle()

    def mark_selected(self) -> None:
        """The masks are those of the scores as they are."""
        self._selected_at = self.steps

    @property
    def scores(self) -> Scores:
        return Scores({n: Dense(s, absolute=True) for n, s in self.s.items()}, self.run.shapes)

    def select(self) -> None:
        """The mask of the scores as they are: top-k of |s| in every layer."""
        if self._selected_at == self.steps:
            return
        if self._native is not None:
            self._native.select()
            self._selected_at = self.steps
            return
        packed = ops.topk_mask(
            list(self.s.values()), self.kept, absolute=True, memory=self.memory, names=list(self.s)
        )
        self.masks = dict(zip(self.s, packed, strict=True))
        self._selected_at = self.steps

    def step(self) -> StepStatistics:
        """One update of every layer; returns what the mask before it was worth."""
        return next(self.train(1))

    def train(self, steps: int, patience: int = 0) -> Iterator[StepStatistics]:
        """Up to `steps` updates; fewer if the mask does not change for `patience` of them."""
        if self._native is not None:
            yield from self._native.train(steps, patience)
            return
        for _ in range(steps):
            before = self.masks
            self.whole = False
            with registry.using(None):  # the environment is read once a step, not once a call
                self.history.append(self._step())
            self.whole = True
            yield self.history[-1]
            if patience:
                self.select()
                same = all(torch.equal(before[n], self.masks[n]) for n in before)
                self.unchanged = self.unchanged + 1 if same else 0
                if self.unchanged >= patience:
                    return

    def dead(self, step: int, where: str) -> PaikernError:
        return PaikernError(
            f"dpai: dead network at step {step}: no path from the input to the output is "
            f"left{where}; lower the sparsity or use another seed"
        )

    def refuse_dead(self) -> None:
        """An error if reviving did not lead to any path."""
        if self._revival is not None and self.steps:
            self.select()
            if self.flow.forward(self.run.state, self.masks) == -math.inf:
                raise self.dead(self.steps + 1, self.flow.where_dead)

    def not_finite(self, name: str) -> PaikernError:
        return PaikernError(
            f"dpai: scores of {name} are NaN or infinite after step {self.steps}; use a smaller lr"
        )

    def _step(self) -> StepStatistics:
        self.select()
        objective = self.flow.forward(self.run.state, self.masks, outputs=True)
        revivable = self._revival is not None and not self.published
        if math.isnan(objective) or (objective == -math.inf and not revivable):
            raise self.dead(self.steps + 1, self.flow.where_dead)
        self.steps += 1
        mantissa, top = self.flow.total
        counts = {"nodes": 0, "kernels": 0, "params": 0}
        gathered: dict[str, tuple[Tensor, Tensor]] = {}

        def visit(v: Visit) -> None:
            name = v.step.parameter
            if name not in self.s:
                return
            scale = 1.0
            if mantissa == 0.0:
                assert self._revival is not None
                scale = self._revival.scale(v, self.s[name], self.kept_of[name])
            elif not self.published:
                scale = math.ldexp(1.0 / mantissa, v.exponent - top)
            live = _live_nodes(v)
            if len(self.uses[name]) > 1 or v.step.rows is not None:
                self._gather(gathered, v, scale, live)
                return
            self._count(counts, live, *self._update(v, scale, live))

        self.flow.backward(visit)
        for name, (q, live) in gathered.items():
            transposed = self.uses[name][0].transposed
            mask = self.masks[name]
            if name in self._on_path:
                mask = ops.pack_mask(ops.unpack_mask(mask, q.shape) & self._on_path.pop(name))
            found = ops.dpai_update_(
                self.s[name], q, mask, live,
                exp_avg=self.m.get(name), exp_avg_sq=self.v.get(name),
                alpha=self.settings.alpha, beta=self.settings.beta,
                lr=self.lr[name], t=self.steps,
                groups=self.uses[name][0].groups, transposed=transposed,
            )  # fmt: skip
            self._count(counts, live, *self._checked(name, found))
        return StepStatistics(self.steps, objective, **counts, published=self.published)

    def _update(self, v: Visit, scale: float, live: Tensor) -> tuple[int, int]:
        step, name = v.step, v.step.parameter
        s, mask, x, g = self.s[name], self.masks[name], v.x, v.g
        if self._revival is not None:
            mask = self._revival.living(v, mask, s.shape)
            x, g = self._revival.borrow(v)
        if step.transposed:
            x, g = g, x  # the stored rows are the inputs
        if step.kind == "linear":
            x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        # The kernel itself: its operation would check shapes that tracing has checked.
        found = weights.kernel("dpai_step_", s, x)(
            s, mask, x.contiguous(), g.contiguous(), live,
            self.m.get(name), self.v.get(name), scale,
            self.settings.alpha, self.settings.beta, self.lr[name], self.steps,
            step.stride, step.padding, step.dilation, step.groups, step.transposed,
        )  # fmt: skip
        return self._checked(name, found.tolist())

    def _checked(self, name: str, found: Sequence[int]) -> tuple[int, int]:
        params, kernels, finite = found
        if not finite:
            raise self.not_finite(name)
        return params, kernels

    def _gather(
        self, into: dict[str, tuple[Tensor, Tensor]], v: Visit, scale: float, live: Tensor
    ) -> None:
        """q of a parameter that is used twice or by rows: summed before its one update."""
        step, name = v.step, v.step.parameter
        rows = slice(None) if step.rows is None else slice(*step.rows)
        if name not in into:
            nodes = self.s[name].shape[0] if step.rows is not None else live.numel()
            total = torch.zeros_like(self.s[name])
            into[name] = (total, total.new_zeros(nodes, dtype=torch.uint8))
        total, nodes_live = into[name]
        x, g = v.x, v.g
        if self._revival is not None:
            on_path = weights.score(step, x, g, {name: self.s[name]}, {}, 0) > 0
            self._on_path.setdefault(name, torch.zeros_like(total, dtype=torch.bool))[rows] |= (
                on_path
            )
            x, g = self._revival.borrow(v)
        total[rows] += weights.score(step, x, g, {name: self.s[name]}, {}, 0) * scale
        nodes_live[rows] |= live

    @staticmethod
    def _count(counts: dict[str, int], live: Tensor, params: int, kernels: int) -> None:
        counts["nodes"] += sum(live.tolist())  # a torch sum costs three times as much here
        counts["params"] += params
        counts["kernels"] += kernels


class _NativeSteps:
    """The same steps by the native loop (csrc/cpu/dpai_loop.h)."""

    _DONE, _TIME, _DEAD, _BROKEN, _NOT_FINITE, _UNCHANGED = range(6)

    def __init__(self, trainer: DPaITrainer, program: Program) -> None:
        self.trainer = trainer
        self.program = program
        self._made: list[tuple[int, list[tuple[float, int, int, int]]]] = []
        settings = trainer.settings
        self._gathered = {
            name: torch.empty_like(trainer.s[name])
            for name, uses in trainer.uses.items()
            if name in trainer.s and (len(uses) > 1 or uses[0].rows is not None)
        }
        self.loop = registry.resolve("dpai_loop", "cpu", False)(
            program.native,
            [self._layer(i, name) for i, name in enumerate(trainer.s)],
            settings.alpha,
            settings.beta,
            settings.optimizer == "adam",
        )

    def _layer(self, index: int, name: str) -> dict[str, Any]:
        t = self.trainer
        s = t.s[name]
        layer: dict[str, Any] = {
            "s": s.data_ptr(),
            "mask": t.masks[name].data_ptr(),
            "memory": t.memory[index].data_ptr(),
            "numel": s.numel(),
            "k": t.kept[index],
            "lr": t.lr[name],
        }
        if t.m:
            layer |= {"m": t.m[name].data_ptr(), "v": t.v[name].data_ptr()}
        if name in self._gathered:
            use = t.uses[name][0]
            kernel, ones = tuple(s.shape[2:]), (1,) * (s.dim() - 2)
            one_position = (1, s.shape[1] * use.groups, *kernel)
            layer |= {
                "gathered": self._gathered[name].data_ptr(),
                "update": registry.resolve("path_geometry", "cpu", False)(
                    tuple(s.shape), one_position, ones, (0,) * len(ones), ones, use.groups
                ),
                "nodes": s.shape[1] * use.groups if use.transposed else s.shape[0],
                "node_is_channel": use.transposed,
            }
        return layer

    def select(self) -> None:
        self._check(self.loop.select())

    def train(self, steps: int, patience: int) -> Iterator[StepStatistics]:
        t = self.trainer
        self.loop.unchanged = t.unchanged
        last = t.steps + steps
        while t.steps < last:
            # Ctrl-C is raised between two bytecodes, so after the scores have moved and before the
            # result has a name: the list has it by then, and settle() finds it there.
            call = ([t.steps], [last - t.steps], [_SECONDS_A_CALL], [patience])
            self._made.extend(map(self.loop.run, *call))
            first = t.steps
            status = self.settle()
            yield from t.history[first:]
            if status == self._DEAD:
                where = f" (none gets past {self.program.name(self.program.native.dead)})"
                raise t.dead(t.steps + 1, where if self.program.native.dead >= 0 else "")
            if status == self._BROKEN:
                raise self.program.overflow()
            if status == self._NOT_FINITE:
                t.steps += 1
                self._check(self.loop.layer_at_fault)
            if status == self._UNCHANGED:
                return

    def settle(self) -> int:
        """Counts the steps of the last call, once; returns its status."""
        t = self.trainer
        if not self._made:
            return self._DONE
        status, records = self._made[-1]
        first = t.steps
        made = [
            StepStatistics(number, objective, nodes, kernels, params, t.published)
            for number, (objective, nodes, kernels, params) in enumerate(records, first + 1)
        ]
        t.history[first:] = made
        t.unchanged = self.loop.unchanged
        t.steps = first + len(made)
        # A failed step counts no record; a finished one has selected its mask.
        t.mark_selected()
        self._made.clear()
        return int(status)

    def _check(self, layer: int) -> None:
        if layer >= 0:
            raise self.trainer.not_finite(list(self.trainer.s)[layer])


def _native(trainer: DPaITrainer) -> _NativeSteps | DeviceSteps | None:
    if (steps := device_steps(trainer)) is not None:
        return steps
    program = compiled(trainer.flow, trainer.run.state, list(trainer.s), keep="nodes")
    return None if program is None else _NativeSteps(trainer, program)


def _live_nodes(v: Visit) -> Tensor:
    assert v.y is not None
    return ops.live_nodes(v.y, v.g, -1 if v.step.kind == "linear" else 1)


def _start(run: Run, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if given is None:
        return normal_scores(run)
    for name in given:
        if name not in run.layers:
            raise ValueError(f"init_scores: {name!r} is no prunable parameter of this model")
    start = {}
    for name, layer in run.layers.items():
        if name not in given:
            raise ValueError(f"init_scores: scores for {name!r} are missing")
        if tuple(given[name].shape) != layer.shape:
            raise ValueError(
                f"init_scores[{name!r}] must have shape {layer.shape}, "
                f"got {tuple(given[name].shape)}"
            )
        if not bool(torch.isfinite(given[name]).all()):
            raise ValueError(f"init_scores[{name!r}] holds NaN or infinite values")
        start[name] = given[name].detach().to("cpu", torch.float32).contiguous().clone()
    return start
