"""What a path rule works with: the tracer that turns ATen calls into steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paikern.errors import PathRuleError
from paikern.pathgraph import steps
from paikern.pathgraph.graph import DataValue, ParamValue, PathValue
from paikern.pathgraph.steps import State, Step


@dataclass
class Tracer:
    """Collects steps. A rule receives it with the call's arguments and returns path values.

    The methods a rule needs: `identity`, `replay`, `reshape`, `scale`, `add`, `gate`, `weight`.
    `out_shape` is the shape of the result of the call at hand.
    """

    steps: list[Step] = field(default_factory=list)
    inputs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    buffer_names: dict[int, str] = field(default_factory=dict)
    out_shapes: tuple[tuple[int, ...], ...] = ()
    where: str = ""
    op: str = ""
    _count: int = 0
    _values: dict[int, PathValue] = field(default_factory=dict)
    _scalar_of: dict[int, PathValue] = field(default_factory=dict)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.out_shapes[0]

    def at(self, where: str, op: str, value: Any) -> None:
        """Move to an ATen call; steps made from here on are named after it."""
        self.where = where
        self.op = op
        values = value if isinstance(value, (list, tuple)) else [value]
        self.out_shapes = tuple(tuple(v.shape) for v in values if isinstance(v, Tensor))

    def error(self, reason: str) -> PathRuleError:
        place = f"module {self.where!r}" if self.where else "the model's forward"
        return PathRuleError(
            f"{self.op} in {place}: {reason}; teach paikern with "
            f"@paikern.register_path_rule({self.op!r})"
        )

    # --- values -------------------------------------------------------------------------------

    def new_value(self, shape: Sequence[int], root: int | None = None) -> PathValue:
        self._count += 1
        value = PathValue(self._count, tuple(shape), self._count if root is None else root)
        self._values[value.id] = value
        return value

    def new_input(self, shape: Sequence[int]) -> PathValue:
        """A place where paths begin: counts as ones."""
        value = self.new_value(shape)
        self.inputs[value.id] = value.shape
        return value

    def emit(
        self,
        make: Callable[..., Step],
        sources: Sequence[PathValue],
        shape: Sequence[int],
        *args: Any,
        root: int | None = None,
        **kwargs: Any,
    ) -> PathValue:
        out = self.new_value(shape, root)
        ids = tuple(source.id for source in sources)
        self.steps.append(make(ids, out.id, self.where, self.op, *args, **kwargs))
        return out

    # --- what rules return --------------------------------------------------------------------

    def identity(self, x: PathValue) -> PathValue:
        """Activations, dropout, casts: paths pass unchanged."""
        return x

    def rectify(self, x: PathValue) -> PathValue:
        return self.emit(steps.Rectify, [x], x.shape, root=x.root)

    def reshape(self, x: PathValue, shape: Sequence[int]) -> PathValue:
        if tuple(shape) == x.shape:
            return x
        return self.emit(steps.Reshape, [x], shape, x.shape, tuple(shape), root=x.root)

    def permute(self, x: PathValue, dims: Sequence[int]) -> PathValue:
        dims = tuple(d % len(x.shape) for d in dims)
        if dims == tuple(range(len(dims))):
            return x
        shape = tuple(x.shape[d] for d in dims)
        return self.emit(steps.Permute, [x], shape, dims, root=x.root)

    def expand(self, x: PathValue, shape: Sequence[int]) -> PathValue:
        if tuple(shape) == x.shape:
            return x
        return self.emit(steps.Expand, [x], shape, x.shape, tuple(shape), root=x.root)

    def part(
        self, x: PathValue, dim: int, start: int, stop: int, step: int, shape: Sequence[int]
    ) -> PathValue:
        """A slice. Its root is new: two halves of one tensor multiplied are a gate."""
        if (start, stop, step) == (0, x.shape[dim], 1):
            return self.reshape(x, shape)
        return self.emit(steps.Slice, [x], shape, x.shape, dim, start, stop, step, tuple(shape))

    def mean(self, x: PathValue, dims: Sequence[int], average: bool) -> PathValue:
        """Mean or sum over `dims`; keeps its root, for norms written by hand."""
        dims = tuple(sorted(d % len(x.shape) for d in dims)) or tuple(range(len(x.shape)))
        return self.emit(
            steps.Mean, [x], self.out_shape, x.shape, dims, self.out_shape, average, root=x.root
        )

    def replay(
        self, x: PathValue, fn: Callable[[Tensor], Tensor], *, keep_input: bool = False
    ) -> PathValue:
        """Run `fn` as it is. It must be linear, or a maximum (`keep_input=True`)."""
        return self.emit(steps.Replay, [x], self.out_shape, fn, x.shape, keep_input)

    def permute_last(self, x: PathValue) -> PathValue:
        dims = list(range(len(x.shape)))
        dims[-2:] = dims[:-3:-1]
        return self.permute(x, dims)

    def pad(self, x: PathValue, pads: list[int], shape: Sequence[int]) -> PathValue:
        """Padding brings no paths, whatever its value."""
        return self.emit(steps.Replay, [x], shape, lambda t: F.pad(t, pads), x.shape, False)

    def new_function(self, x: PathValue) -> PathValue:
        """A statistic of `x` (its spread): a mean over whatever the result has lost."""
        return self.emit(
            steps.Replay, [x], self.out_shape,
            lambda t, shape=self.out_shape: t.mean().expand(shape), x.shape, False, root=x.root,
        )  # fmt: skip

    def scale(self, x: PathValue, factor: Any) -> PathValue:
        """Product with a constant or a parameter, entered by its absolute value."""
        if isinstance(factor, (int, float)):
            if factor in (1, -1):
                return x
            value = float(factor)
            out = self.emit(
                steps.Scale,
                [x],
                x.shape,
                lambda state: torch.tensor(value, dtype=torch.float64),
                False,
                x.shape,
                x.shape,
                (),
                root=x.root,
            )
            self._scalar_of[out.id] = x
            return out
        learned = isinstance(factor, ParamValue)
        evaluate = factor.evaluate if isinstance(factor, ParamValue) else _constantly(factor)
        size = factor.shape if isinstance(factor, ParamValue) else _tensor(factor).shape
        shape = _broadcast(x.shape, tuple(size))
        # A learned scale is a norm: what follows is no longer a function of x alone.
        root = None if learned else x.root
        return self.emit(
            steps.Scale, [x], shape, evaluate, learned, x.shape, shape, tuple(size), root=root
        )

    def add(self, branches: Sequence[PathValue]) -> PathValue:
        """Residual adds and gates: the paths of all branches together.

        A sum of functions of one tensor is a function of it: `x + 0.04 * x**3` inside a GELU.
        """
        shape = _broadcast(*(b.shape for b in branches))
        roots = {b.root for b in branches}
        return self.emit(
            steps.Add, branches, shape, tuple(b.shape for b in branches), shape,
            root=roots.pop() if len(roots) == 1 else None,
        )  # fmt: skip

    def gate(self, u: PathValue, v: PathValue) -> PathValue:
        """`u * v`: a gate adds the paths of both; a function of one tensor is an activation.

        Same root (hand-written GELU, SiLU, RMSNorm): the result is that tensor once, not twice.
        """
        if u.root != v.root:
            return self.add([u, v])
        shape = tuple(torch.broadcast_shapes(u.shape, v.shape))
        root = self._values[u.root]
        if root.shape == shape:
            return root
        return u if u.shape == shape else v

    def weight(self, x: PathValue, w: Any, **geometry: Any) -> PathValue:
        """A linear or convolution step by a parameter."""
        if not isinstance(w, ParamValue) or w.parameter is None:
            raise self.error(
                "its weight is computed from other tensors (weight norm, standardisation or a "
                "product of parameters), so there is no parameter to prune; fold it first"
            )
        return self.emit(
            steps.Weight,
            [x],
            self.out_shape,
            w.parameter,
            in_shape=x.shape,
            out_shape=self.out_shape,
            rows=w.rows,
            **geometry,
        )

    def without_scalar(self, x: PathValue) -> PathValue:
        """`x` before a product with one number: the 1/sqrt(d) of attention is not a path weight."""
        return self._scalar_of.get(x.id, x)

    def reader(self, value: Any) -> Callable[[State], Tensor] | None:
        """How to read a norm's vector from the model's state when the graph runs."""
        if value is None:
            return None
        if isinstance(value, ParamValue):
            return value.evaluate
        name = self.buffer_names.get(id(value))
        return _constantly(value) if name is None else lambda state: state[name]


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """What the model broadcast these to. (`torch.broadcast_shapes` imports sympy, 0.3 s.)"""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*padded, strict=True))


def _tensor(value: Any) -> Tensor:
    return value.tensor if isinstance(value, DataValue) else torch.as_tensor(value)


def _constantly(value: Any) -> Callable[[State], Tensor]:
    tensor = _tensor(value)
    return lambda state: tensor
