"""`PathGraph`: the linear steps between a model's input of ones and its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paikern.pathgraph.steps import State, Step, Weight


@dataclass(frozen=True)
class PathValue:
    """A tensor that carries paths.

    `root` is the value it is a weightless function of: a product of two values with one root is
    an activation or a norm written by hand, a product of two roots is a gate.
    """

    id: int
    shape: tuple[int, ...]
    root: int


@dataclass(frozen=True)
class ParamValue:
    """A tensor made from parameters alone.

    `parameter` names the one parameter that this is a view of, if it is a view that a weight step
    can use: whole or `rows` of it, as stored or `transposed`. Otherwise None, and only `evaluate`
    can say what the values are.
    """

    evaluate: Callable[[State], Tensor]
    shape: tuple[int, ...]
    parameter: str | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class DataValue:
    """A tensor computed from integer or boolean inputs (token ids): no path, but not constant."""

    tensor: Tensor


@dataclass(frozen=True)
class AttentionValue:
    """The product of queries and keys on its way to the softmax and to the values."""

    query: PathValue
    key: PathValue
    shape: tuple[int, ...]
    visible: Tensor | None = None
    normalised: bool = False


@dataclass(frozen=True)
class PathGraph:
    """Steps in execution order, the input values (ones) and the output values (summed into R).

    `notes` holds what tracing decided and a user may want to know. A graph knows no weights and
    no method, so one graph serves every method and every state of the same model. `recorded` are
    the steps together with those that no path to an output passes: the statistic that a norm
    divides by, a branch whose result is not used.
    """

    steps: tuple[Step, ...]
    inputs: dict[int, tuple[int, ...]]
    outputs: tuple[int, ...]
    notes: tuple[str, ...] = ()
    recorded: tuple[Step, ...] = ()

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weight steps in execution order; a shared parameter appears once per use."""
        return tuple(step for step in self.steps if isinstance(step, Weight))

    def uses(self) -> dict[str, list[Weight]]:
        """Parameter name -> the steps that use it."""
        found: dict[str, list[Weight]] = {}
        for step in self.weights:
            found.setdefault(step.parameter, []).append(step)
        return found

    def __repr__(self) -> str:
        parameters = len(self.uses())
        return f"PathGraph({len(self.steps)} steps, {parameters} weights)"


Value = (
    PathValue | ParamValue | DataValue | AttentionValue | torch.Tensor | int | float | bool | None
)
