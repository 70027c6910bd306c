"""A path graph as a program for the native sweeps: steps with addresses instead of names.

`Flow` (flow.py) calls one operation after the other and is what every backend can do. Loops of
many sweeps over one model (DPaI's steps, SynFlow's rounds) compile it once: every map gets a place
in one arena, shared by maps that are not needed at the same time, and the steps run natively.
Operations without a native form (attention, permutations, what a rule replays) call back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from paikern.pathgraph import steps as kinds
from paikern.pathgraph.flow import Cotangent, Flow, not_finite
from paikern.pathgraph.places import Map, Value, lay_out, pair, shapes_of, values_of
from paikern.pathgraph.steps import State, Step


class Program:
    """The native form of both sweeps of `flow` over the tensors in `state`.

    Args:
        flow: float32; says what counts as a path.
        state: parameter and buffer names -> tensors, held by the program.
        parameters: the names whose masks change from sweep to sweep; `set_mask` takes their index.
        keep: maps to keep past their last use: "scores" both maps of every weight step until the
            next forward sweep, "nodes" the output of every weight step until its visit.

    Attributes:
        native: the `_C.PathFlow`.
        steps: (step, inputs, output) of the plan, in the order of the program.
    """

    def __init__(self, flow: Flow, state: State, parameters: Sequence[str], keep: str) -> None:
        self.flow = flow
        self.steps = [s for s in flow.plan.steps if not isinstance(s[0], kinds.Reshape)]
        self._index = {name: i for i, name in enumerate(parameters)}
        self._held: list[Any] = []
        self._saved: dict[int, Any] = {}
        flow.bind(state)
        self._values = values_of(flow)
        self._divided: dict[int, Map] = {}
        arena = torch.empty(lay_out(flow, self.steps, self._values, keep, self._divided))
        self._arena = arena
        self._views = {
            id_: (self._view(v.a, v.shape), self._view(v.g, v.shape))
            for id_, v in self._values.items()
        }
        own = [id_ for id_, v in self._values.items() if v.root == id_]
        order = {id_: own.index(v.root) for id_, v in self._values.items()}
        self._outputs = list(dict.fromkeys(order[i] for i in flow.plan.outputs))
        self.native = registry.resolve("path_flow", "cpu", False)(
            [self._describe_value(self._values[id_]) for id_ in own],
            [self._describe_step(i, order) for i in range(len(self.steps))],
            self._outputs,
            len(parameters),
            flow.by_input_max,
            flow.counts,
            self,
        )

    @property
    def arena_bytes(self) -> int:
        return self._arena.numel() * 4

    def name(self, index: int) -> str:
        """The parameter of a step, for messages."""
        step = self.steps[index][0]
        return step.parameter if isinstance(step, kinds.Weight) else step.where or step.op

    def overflow(self) -> NonFiniteScoreError:
        """The error of a sweep whose counts were not finite."""
        return not_finite(self.name(self.native.broken))

    @property
    def outputs(self) -> list[tuple[Tensor, int]]:
        """What arrived at each output of the graph, between the two sweeps."""
        exponents = [self.native.exponent(i) for i in self._outputs]
        shaped = (self._views[i][0] for i in self.flow.plan.outputs)
        return list(zip(shaped, exponents, strict=True))

    def set_cotangent(self, cotangent: Cotangent) -> None:
        """In place of ones at the outputs; only its direction counts."""
        top = max(e for _, e in cotangent)
        self._cotangent = [
            (t * 2.0 ** max(-1000, e - top)).to(torch.float32).contiguous() for t, e in cotangent
        ]
        for i, t in enumerate(self._cotangent):
            self.native.set_cotangent(i, t.data_ptr())

    def weight_step(self, parameter: str) -> int:
        """The number of the one step that uses a parameter."""
        (found,) = (
            i
            for i, (step, _, _) in enumerate(self.steps)
            if isinstance(step, kinds.Weight) and step.parameter == parameter
        )
        return found

    # --- called from the native sweeps ---------------------------------------------------------

    def forward(self, index: int, exponents: list[int]) -> None:
        """Replay a step that has no native form."""
        step, inputs, output = self.steps[index]
        with torch.no_grad():
            given = [(self._views[i][0], e) for i, e in zip(inputs, exponents, strict=True)]
            y, _, self._saved[index] = self.flow.run_step(step, given)
            self._views[output][0].copy_(y)

    def adjoint(self, index: int) -> list[int]:
        """The adjoint of such a step; the arrays live until the next call."""
        step, _, output = self.steps[index]
        with torch.no_grad():
            parts = self.flow.run_adjoint(step, self._views[output][1], self._saved.pop(index))
        self._parts = [part.to(torch.float32).contiguous() for part in parts]
        return [part.data_ptr() for part in self._parts]

    # --- memory --------------------------------------------------------------------------------

    def _view(self, m: Map, shape: tuple[int, ...]) -> Tensor:
        return self._arena[m.offset : m.offset + m.numel].view(shape)

    def _address(self, m: Map) -> int:
        return self._arena.data_ptr() + 4 * m.offset

    def _hold(self, tensor: Tensor) -> int:
        """The address of a tensor that lives as long as the program."""
        self._held.append(tensor)
        return tensor.data_ptr()

    # --- the native description ----------------------------------------------------------------

    def _describe_value(self, v: Value) -> dict[str, Any]:
        return {
            "a": self._address(v.a),
            "g": self._address(v.g),
            "numel": v.a.numel,
            "start": v.start,
        }

    def _describe_step(self, index: int, order: dict[int, int]) -> dict[str, Any]:
        step, inputs, output = self.steps[index]
        made = {"inputs": [order[i] for i in inputs], "output": order[output]}
        shapes = [self._values[i].shape for i in inputs]
        for kind, describe in _DESCRIBE.items():
            if isinstance(step, kind):
                found = describe(self, step, shapes, self._values[output].shape)
                if found is not None:
                    if index in self._divided:
                        found["divided"] = self._address(self._divided[index])
                    return {**made, **found}
        return {**made, "kind": _CALL}

    def _weight(
        self, step: kinds.Weight, shapes: list[tuple[int, ...]], out: tuple[int, ...]
    ) -> dict[str, Any]:
        w = self.flow.state[step.parameter]
        rows = slice(None) if step.rows is None else slice(*step.rows)
        used = w[rows]
        if step.kind == "linear":
            used = used.flatten(1)
        columns_of = out if step.transposed else shapes[0]
        found: dict[str, Any] = {
            "kind": 0,
            "geometry": registry.resolve("path_geometry", "cpu", False)(
                tuple(used.shape), columns_of, step.stride, step.padding, step.dilation, step.groups
            ),
            "transposed": step.transposed,
            "power": self.flow.semantics.power,
        }
        if self.flow.semantics.power:
            used = used.detach().contiguous()
            found["type"] = registry.resolve("weight_type", "cpu", False)(used.dtype)
            found["weight"] = self._hold(used)
        if step.parameter in self._index:
            found["parameter"] = self._index[step.parameter]
        if step.rows is not None:
            found["first_bit"] = step.rows[0] * math.prod(w.shape[1:])
        channels = out[-1] if step.kind == "linear" else out[1]
        outer = math.prod(out[:-1]) if step.kind == "linear" else out[0]
        found |= {"outer": outer, "channels": channels}
        found["inner"] = math.prod(out) // max(1, outer * channels)
        if self.flow.semantics.offsets and step.bias is not None:
            found["offset"] = self._hold(self.flow.bias_offset(step).float().contiguous())
        return found

    def _add(
        self, step: kinds.Add, shapes: list[tuple[int, ...]], out: tuple[int, ...]
    ) -> dict[str, Any] | None:
        return {"kind": 1} if all(shape == out for shape in shapes) else None

    def _norm(
        self, step: kinds.Norm, shapes: list[tuple[int, ...]], out: tuple[int, ...]
    ) -> dict[str, Any] | None:
        scale, offset = self.flow.norm_factors(step, torch.empty(()))
        return self._per_channel(out, scale, offset)

    def _scale(
        self, step: kinds.Scale, shapes: list[tuple[int, ...]], out: tuple[int, ...]
    ) -> dict[str, Any] | None:
        if step.in_shape != step.out_shape:
            return None
        return self._per_channel(out, self.flow.scale_factor(step, torch.empty(())), None)

    def _per_channel(
        self, out: tuple[int, ...], scale: Tensor | None, offset: Tensor | None
    ) -> dict[str, Any] | None:
        """Factors along one axis of the map, or one factor for all of it."""
        found: dict[str, Any] = {"kind": 2}
        axis = None
        for name, factor in (("factor", scale), ("offset", offset)):
            if factor is None:
                continue
            wide = [1] * (len(out) - factor.dim()) + list(factor.shape)
            long = [d for d, n in enumerate(wide) if n > 1]
            if len(long) > 1 or (long and axis not in (None, long[0])):
                return None
            axis = long[0] if long else axis
            found[name] = factor
        at = 0 if axis is None else axis
        channels = 1 if axis is None else out[axis]
        for name in ("factor", "offset"):
            if name in found:
                flat = found[name].float().reshape(-1).expand(channels).contiguous()
                found[name] = self._hold(flat)
        outer = math.prod(out[:at])
        inner = math.prod(out) // max(1, outer * channels)
        return {**found, "outer": outer, "channels": channels, "inner": inner}

    def _rectify(
        self, step: kinds.Rectify, shapes: list[tuple[int, ...]], out: tuple[int, ...]
    ) -> dict[str, Any]:
        return {"kind": 3}

    def _mean(
        self, step: kinds.Mean, shapes: list[tuple[int, ...]], out: tuple[int, ...]
    ) -> dict[str, Any] | None:
        dims = sorted(d % len(step.in_shape) for d in step.dims)
        if not dims or dims != list(range(dims[0], dims[-1] + 1)):
            return None
        return {
            "kind": 4,
            "outer": math.prod(step.in_shape[: dims[0]]),
            "channels": math.prod(step.in_shape[dims[0] : dims[-1] + 1]),
            "inner": math.prod(step.in_shape[dims[-1] + 1 :]),
            "average": step.average,
        }

    def _max_pool(
        self, step: kinds.MaxPool, shapes: list[tuple[int, ...]], out: tuple[int, ...]
    ) -> dict[str, Any] | None:
        if step.spatial != 2:
            return None
        pairs = [
            pair(v)
            for v in (
                step.in_shape[-2:],
                step.out_shape[-2:],
                step.kernel,
                step.stride or step.kernel,
                step.padding,
                step.dilation,
            )
        ]
        planes = math.prod(step.in_shape[:-2])
        return {
            "kind": 5,
            "pool": [planes, *(n for pair in pairs for n in pair)],
            "argmax": self._hold(torch.empty(math.prod(out), dtype=torch.int32)),
        }


_CALL = 6
_DESCRIBE: dict[type[Step], Callable[..., dict[str, Any] | None]] = {
    kinds.Weight: Program._weight,
    kinds.Add: Program._add,
    kinds.Norm: Program._norm,
    kinds.Scale: Program._scale,
    kinds.Rectify: Program._rectify,
    kinds.Mean: Program._mean,
    kinds.MaxPool: Program._max_pool,
}


def compiled(flow: Flow, state: State, parameters: Sequence[str], keep: str) -> Program | None:
    """The program of `flow`, or None where the native sweeps cannot run it.

    They need the CPU, float32 maps, weights that the native kernels read and maps of at least one
    element.
    """
    if flow.dtype != torch.float32 or not registry.has("path_flow", "cpu"):
        return None
    if any(not t.is_cpu and not t.is_meta for t in state.values()):
        return None
    if flow.semantics.power:
        read = [state[step.parameter] for step in flow.graph.weights]
        code = registry.resolve("weight_type", "cpu", False)
        if any(w.is_meta or code(w.dtype) is None for w in read):
            return None
    flow.bind(state)
    shapes = shapes_of(flow)
    if any(math.prod(shape) == 0 for shape in shapes.values()):
        return None
    if any(math.prod(state[step.parameter].shape) == 0 for step in flow.graph.weights):
        return None
    return Program(flow, state, parameters, keep)


__all__ = ["Program", "compiled"]
