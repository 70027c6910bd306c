"""The two sweeps over a path graph: incoming counts `a` forwards, outgoing counts `g` backwards.

No autograd graph is recorded and no tensor of the size of a weight is made: a weight step meets
its two vectors (or maps) in the backward sweep, where a visitor turns them into scores, counts
or an update, and both are freed as soon as no later step needs them.

Numbers. A value is a float tensor and one integer exponent, `t * 2**e`. After every weight step
the tensor is brought into [1, 2) by its maximum, which is exact; where branches meet, the one
with the smaller exponent is shifted. ResNet-50 at 224 has a SynFlow total near 4e72, far beyond
float32, and needs nothing special.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paikern import ops
from paikern.errors import NonFiniteScoreError
from paikern.pathgraph import weights
from paikern.pathgraph.graph import PathGraph
from paikern.pathgraph.steps import Norm, Rectify, Scale, State, Step, Weight

Masks = Mapping[str, Tensor]
"""Parameter name -> packed mask; a parameter that is missing is dense."""

# Counts are integers (times means), so a positive count that would underflow is held at 2**-60 of
# the maximum instead: the flags "reached" and "not reached" then never depend on rounding. It
# touches no value that could change a sum in float32, and cannot matter before 2**50.
_FLOOR = 2.0**-60
_FLOOR_FROM = 50


@dataclass(frozen=True)
class Semantics:
    """What a method takes a path to be.

    power: a weight counts as `|w|**power`; 0 counts the kept weights themselves (DPaI).
    norm: "identity" leaves norms and learned scales out, "scale" multiplies by their positive
        factor, raised to the same power.
    offsets: keep |bias|, the offset of norms in eval mode and ReLU thresholds, as the published
        SynFlow code does; only then may values be negative.
    """

    power: int = 1
    norm: str = "identity"
    offsets: bool = False


@dataclass
class Visit:
    """A weight step in the backward sweep: the score is `|w|**p * (g^T x) * 2**exponent`."""

    step: Weight
    x: Tensor
    g: Tensor
    exponent: int
    y: Tensor | None = None


Visitor = Callable[[Visit], None]
_Value = tuple[Tensor, int]
Cotangent = Sequence[tuple[Tensor, int]]
"""One tensor and its exponent, `t * 2**e`, for each output of a graph, in its shape."""


class Flow:
    """Both sweeps of one graph under one `Semantics`; reusable for any number of rounds.

    Args:
        graph: from `trace`.
        semantics: what counts as a path.
        dtype: of the maps, float32 or float64 (float64 runs on the reference backend).
        rescale: "exponent" as described above, or "input_max": every weight step divides its
            input by the maximum of it, and the division takes part in the derivative. That is the
            published DPaI objective, `J = log sum(outputs) + sum_l log max_l`.
    """

    def __init__(
        self,
        graph: PathGraph,
        semantics: Semantics,
        *,
        dtype: torch.dtype = torch.float32,
        rescale: str = "exponent",
    ) -> None:
        self.graph = graph
        self.semantics = semantics
        self.dtype = dtype
        self.by_input_max = rescale == "input_max"
        self.counts = semantics.power == 0 and not self.by_input_max
        self.plan = _plan(graph, semantics)
        self._last_use = self.plan.last_use()
        self._kept: list[Any] = []
        self._outputs: list[_Value] = []
        self._masks: Masks = {}
        self.state: State = {}
        self.log_total = -math.inf
        self.total: tuple[float, int] = (0.0, 0)
        self.first_dead: str | None = None
        self._top = 0.0

    def bind(self, state: State) -> None:
        """Use these tensors, for callers that run the steps themselves."""
        self.state = state

    @property
    def outputs(self) -> list[_Value]:
        """What arrived at each output of the graph, between the two sweeps."""
        return self._outputs

    @property
    def where_dead(self) -> str:
        """The first layer that no path gets past, as part of a message."""
        return f" (none gets past {self.first_dead})" if self.first_dead else ""

    @torch.no_grad()
    def forward(
        self,
        state: State,
        masks: Masks | None = None,
        *,
        outputs: bool = False,
        arrive: Callable[[Weight, Tensor], None] | None = None,
    ) -> float:
        """Sweep forwards; returns `log R`, -inf where no path is left.

        `state` maps parameter and buffer names to tensors; `outputs` keeps each weight step's
        output for the visitor. `arrive(step, x)` is called before a weight step with its input, up
        to a power of two, and may put that step's mask into `masks`. The published objective `J`
        is returned with "input_max". Weights on the meta device can be counted (power 0), which is
        then done on the CPU.
        """
        self.state, self._masks = state, {} if masks is None else masks
        if self.semantics.power:
            _refuse_meta(self.graph, state)
        device = device_of(state)
        values: dict[int, _Value] = {
            id_: (torch.ones(shape, dtype=self.dtype, device=device), 0)
            for id_, shape in self.graph.inputs.items()
        }
        self._kept = []
        self.first_dead = None  # for the message where no path is left at all
        log_maxima = 0.0
        for index, (step, inputs, output) in enumerate(self.plan.steps):
            given = [values[i] for i in inputs]
            if isinstance(step, Weight):
                x, exponent = given[0]
                maximum = 1.0
                if arrive is not None:
                    arrive(step, x)
                if self.by_input_max:
                    maximum = ops.map_maximum(x)
                    x = x / maximum
                    log_maxima += math.log(maximum) if maximum > 0 else -math.inf
                y = weights.forward(step, x, state, self._masks, self.semantics.power)
                if not self.by_input_max:
                    y, shift = self._normalise(y, step, exponent)
                    exponent += shift
                    maximum = self._top
                if maximum <= 0 and self.first_dead is None:
                    self.first_dead = step.parameter
                if self.semantics.offsets and step.bias is not None:
                    y = y + self._bias(step, y, exponent)
                self._kept.append((x, given[0][1], maximum, y if outputs else None))
            else:
                y, exponent, saved = self.run_step(step, given)
                self._kept.append(saved)
            values[output] = (y, exponent)
            for i in inputs:
                if self._last_use.get(i) == index:
                    values.pop(i, None)
        self._outputs = [values[i] for i in self.plan.outputs]
        top = max(e for _, e in self._outputs)
        mantissa = sum(math.ldexp(float(t.double().sum()), e - top) for t, e in self._outputs)
        self.total = (mantissa, top)
        log_r = math.log(mantissa) + top * math.log(2) if mantissa > 0 else -math.inf
        self.log_total = log_r + (log_maxima if self.by_input_max else 0.0)
        return self.log_total

    @torch.no_grad()
    def backward(self, visit: Visitor, cotangent: Cotangent | None = None) -> None:
        """Sweep backwards from a cotangent of ones, calling `visit` at every weight step.

        With "input_max" the cotangent is 1/R, so that the visits hold the derivative of J. Another
        `cotangent`, one pair for each output of the graph, makes R = sum(cotangent * outputs).
        """
        gradients: dict[int, _Value] = {}
        seed = 1.0 / self.total[0] if self.by_input_max and self.total[0] > 0 else 1.0
        if cotangent is None:
            cotangent = [(torch.full_like(t, seed), 0) for t, _ in self._outputs]
        for id_, (t, _), (c, e) in zip(self.plan.outputs, self._outputs, cotangent, strict=True):
            _accumulate(gradients, id_, (c.to(t), e))
        self._outputs = []
        for index in range(len(self.plan.steps) - 1, -1, -1):
            step, inputs, output = self.plan.steps[index]
            saved = self._kept[index]
            self._kept[index] = None
            arrived = gradients.pop(output, None)
            if arrived is None:
                continue
            g, exponent = arrived
            if isinstance(step, Weight):
                x, x_exponent, maximum, y = saved
                visit(Visit(step, x, g, x_exponent + exponent, y))
                if inputs[0] in self.plan.starts:
                    continue  # nothing lies before the input
                gx = weights.adjoint(step, g, self.state, self._masks, self.semantics.power)
                if self.by_input_max:
                    gx = ops.through_maximum(gx, x, maximum) if maximum > 0 else gx
                else:
                    gx, shift = self._normalise(gx, step, exponent)
                    exponent += shift
                _accumulate(gradients, inputs[0], (gx, exponent))
                continue
            parts = self.run_adjoint(step, g, saved)
            for i, part in zip(inputs, parts, strict=True):
                if i not in self.plan.starts:
                    _accumulate(gradients, i, (part, exponent))

    # --- steps that depend on the semantics or on several inputs -------------------------------

    def run_step(self, step: Step, given: list[_Value]) -> tuple[Tensor, int, Any]:
        x, exponent = given[0]
        if isinstance(step, Scale):
            factor = self.scale_factor(step, x)
            return x * factor, exponent, factor
        if isinstance(step, Norm):
            scale, offset = self.norm_factors(step, x)
            y = x if scale is None else x * scale
            if offset is not None:
                y = y + offset * _power_of_two(-exponent)
            return y, exponent, scale
        if isinstance(step, Rectify):
            return x.clamp(min=0), exponent, x > 0
        if len(given) > 1:
            exponent = max(e for _, e in given)
            y, saved = step.forward([self._shift(t, e - exponent) for t, e in given])
        else:
            y, saved = step.forward([x])
        return y, exponent, saved

    def run_adjoint(self, step: Step, g: Tensor, saved: Any) -> list[Tensor]:
        if isinstance(step, Scale):
            return [(g * saved).sum_to_size(step.in_shape)]
        if isinstance(step, Norm):
            return [g if saved is None else g * saved]
        if isinstance(step, Rectify):
            return [g * saved]
        return step.adjoint(g, saved)

    def scale_factor(self, step: Scale, like: Tensor) -> Tensor:
        factor = step.factor(self.state).to(like.device, like.dtype).abs()
        if step.learned and self.semantics.norm == "identity":
            return torch.ones_like(factor)
        return factor**2 if self.semantics.power == 2 else factor

    def norm_factors(self, step: Norm, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        def read(reader: Any) -> Tensor | None:
            if reader is None:
                return None
            return reader(self.state).to(like.device, like.dtype).abs().reshape(step.shape)

        power = self.semantics.power
        weight, var = read(step.weight), read(step.var)
        if not self.semantics.offsets:
            scale = (
                weight
                if var is None
                else (var + step.eps).rsqrt() * (1 if weight is None else weight)
            )
            return (None if scale is None else scale**power), None
        scale = torch.ones((), dtype=like.dtype) if weight is None else weight**power
        if var is not None:
            scale = scale / (var**power + step.eps).sqrt()
        bias, mean = read(step.bias), read(step.mean)
        offset = None if bias is None else bias**power
        if mean is not None:
            shift = -(mean**power) * scale
            offset = shift if offset is None else offset + shift
        return scale, offset

    def bias_offset(self, step: Weight) -> Tensor:
        """|bias| of a weight step, to the power of the weights."""
        assert step.bias is not None
        return step.bias(self.state).abs() ** max(self.semantics.power, 1)

    def _bias(self, step: Weight, y: Tensor, exponent: int) -> Tensor:
        bias = self.bias_offset(step).to(y.device, y.dtype) * _power_of_two(-exponent)
        if step.kind == "linear":
            return bias
        return bias.reshape(-1, *(1 for _ in step.stride))

    def _normalise(self, t: Tensor, step: Step, before: int) -> tuple[Tensor, int]:
        """Bring the maximum into [1, 2); returns the exact power of two taken out."""
        self._top = top = ops.map_maximum(t)
        if not math.isfinite(top):
            raise not_finite(_place(step))
        shift = math.frexp(top)[1] - 1 if top > 0.0 else 0
        floor = _FLOOR if self.counts and abs(before + shift) > _FLOOR_FROM else 0.0
        if shift or floor:
            t = ops.map_scale(t, -shift, floor=floor)  # fresh from the kernel: in place
        return t, shift

    def _shift(self, t: Tensor, by: int) -> Tensor:
        """A branch that meets a larger one; other steps may still read `t`."""
        if by == 0:
            return t
        return ops.map_scale(t.clone(), by, floor=_FLOOR if self.counts else 0.0)


def device_of(state: State) -> torch.device:
    """Where the tensors of a model lie that have values; the CPU if none has.

    Raises:
        ValueError: on several devices: kernels take addresses and would not notice.
    """
    real = [t for t in state.values() if not t.is_meta]
    if not real or all(t.is_cpu for t in real):
        return torch.device("cpu")
    found = dict.fromkeys(t.device for t in real)
    if len(found) > 1:
        raise ValueError(
            f"model: its tensors are on {' and '.join(map(str, found))}; move them to one device"
        )
    return next(iter(found))


def not_finite(place: str) -> NonFiniteScoreError:
    return NonFiniteScoreError(
        f"path counts overflow or are NaN at {place}: its weights are not finite or too large; "
        "check that parameter"
    )


def _refuse_meta(graph: PathGraph, state: State) -> None:
    for step in graph.weights:
        if state[step.parameter].is_meta:
            raise ValueError(
                f"{step.parameter} is on the meta device and holds no values; "
                "load the weights first"
            )


def _power_of_two(exponent: int) -> float:
    return 2.0 ** max(-1000, min(1000, exponent))


def _place(step: Step) -> str:
    if isinstance(step, Weight):
        return step.parameter
    return step.where or step.op


def _accumulate(into: dict[int, _Value], id_: int, value: _Value) -> None:
    held = into.get(id_)
    if held is None:
        into[id_] = value
        return
    (a, ea), (b, eb) = held, value
    top = max(ea, eb)
    a = a if ea == top else a * _power_of_two(ea - top)
    b = b if eb == top else b * _power_of_two(eb - top)
    into[id_] = (a + b, top)


@dataclass(frozen=True)
class _Plan:
    """The steps that do something under one semantics; identities are followed, not run."""

    steps: list[tuple[Step, tuple[int, ...], int]]
    outputs: tuple[int, ...]
    starts: frozenset[int]

    def last_use(self) -> dict[int, int]:
        last: dict[int, int] = {}
        for index, (_, inputs, _) in enumerate(self.steps):
            last.update(dict.fromkeys(inputs, index))
        for output in self.outputs:
            last.pop(output, None)
        return last


def _plan(graph: PathGraph, semantics: Semantics) -> _Plan:
    same_as: dict[int, int] = {}

    def follow(i: int) -> int:
        return same_as.get(i, i)

    steps = []
    for step in graph.steps:
        inputs = tuple(follow(i) for i in step.inputs)
        if _is_identity(step, semantics):
            same_as[step.output] = inputs[0]
        else:
            steps.append((step, inputs, step.output))
    outputs = tuple(dict.fromkeys(follow(i) for i in graph.outputs))
    return _Plan(steps, outputs, frozenset(graph.inputs))


def _is_identity(step: Step, semantics: Semantics) -> bool:
    if isinstance(step, Norm):
        return semantics.norm == "identity"
    if isinstance(step, Rectify):
        return not semantics.offsets
    if isinstance(step, Scale):
        return step.learned and semantics.norm == "identity" and step.in_shape == step.out_shape
    return False
