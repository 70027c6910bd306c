"""Rounds of a path method on the native sweeps: score, select, repeat, with no Python between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paikern.backends import registry
from paikern.errors import NonFiniteScoreError, PaikernError
from paikern.pathgraph import Flow, Program, compiled
from paikern.scorers.base import Run
from paikern.scorers.device_loop import DeviceLoop, device_loop

# Long enough that Python costs nothing beside the rounds, short enough for Ctrl-C and the progress.
_SECONDS_A_CALL = 0.1
_DONE, _TIME, _DEAD, _BROKEN, _NOT_FINITE, _EMPTIED = range(6)


class PathLoop:
    """The rounds of one run.

    Args:
        run: its `masks` are set after every call into the native loop.
        program: of the flow, keeping the maps of all layers for the selection.
        power: of the score.
        dead: makes the error where no path is left, from words on where they end.
        prepare: called between the two sweeps of every round, to set the cotangent of `program`;
            returns log R under it.
    """

    one_budget = False  # layers may have budgets of their own

    def __init__(
        self,
        run: Run,
        program: Program,
        power: int,
        dead: Callable[[str], PaikernError],
        prepare: Callable[[Program], float] | None = None,
    ) -> None:
        self.run, self.program = run, program
        self._dead, self._prepare = dead, prepare
        self._buffers = {name: _two_masks(run.shapes[name]) for name in run.layers}
        self.native = registry.resolve("path_rounds", "cpu", False)(
            program.native,
            [
                (program.weight_step(name), *(buffer.data_ptr() for buffer in pair))
                for name, pair in self._buffers.items()
            ],
            power,
        )

    def rounds(self, counts: Sequence[Sequence[int]], stop_empty: bool) -> Iterator[float]:
        """Run all rounds; yields log R of each.

        Args:
            counts: for each round what is kept: one number over all layers, or one for each.
            stop_empty: raise after a round that leaves a layer without a weight.
        """
        done = 0
        while done < len(counts):
            status, found = self._call(done, counts, stop_empty)
            if found:
                self.run.masks = self.masks
            done += len(found)
            yield from found
            self._raise(status)

    @property
    def masks(self) -> dict[str, Tensor]:
        current = self.native.current
        return {name: pair[current] for name, pair in self._buffers.items()}

    def _call(
        self, done: int, counts: Sequence[Sequence[int]], stop_empty: bool
    ) -> tuple[int, list[float]]:
        if self._prepare is None:
            status, found = self.native.run(done, counts, _SECONDS_A_CALL, stop_empty)
            return status, found
        status, log_flow = self.native.begin()
        if status != _DONE:
            return status, []
        log_flow = self._prepare(self.program)
        status = self.native.finish(counts[done], stop_empty)
        return status, [log_flow] if status in (_DONE, _EMPTIED) else []

    def _raise(self, status: int) -> None:
        native = self.program.native
        if status == _DEAD:
            where = f" (none gets past {self.program.name(native.dead)})"
            raise self._dead(where if native.dead >= 0 else "")
        if status == _BROKEN:
            raise self.program.overflow()
        if status == _NOT_FINITE:
            name = list(self.run.layers)[self.native.layer_at_fault]
            raise NonFiniteScoreError(
                f"scores of {name} hold NaN: weights and path counts overflow there; "
                "check that parameter"
            )


def _two_masks(shape: tuple[int, ...]) -> list[Tensor]:
    count = (math.prod(shape) + 7) // 8
    return [torch.zeros(count, dtype=torch.uint8) for _ in range(2)]


def path_loop(
    run: Run,
    flow: Flow,
    power: int,
    dead: Callable[[str], PaikernError],
    prepare: Callable[[Program], float] | None = None,
) -> PathLoop | DeviceLoop | None:
    """The loop for a run, or None where it has something that the native sweeps do not do.

    Every layer must be used once and as a whole, by a weight that the native kernels read. On a
    GPU there is none for rounds that are prepared between the sweeps.
    """
    if prepare is None and (loop := device_loop(run, flow, power, dead)) is not None:
        return loop
    uses = flow.graph.uses()
    for name in run.layers:
        steps = uses.get(name, ())
        if len(steps) != 1 or steps[0].rows is not None:
            return None
    program = compiled(flow, run.state, list(run.layers), keep="scores")
    return None if program is None else PathLoop(run, program, power, dead, prepare)


__all__ = ["PathLoop", "path_loop"]
