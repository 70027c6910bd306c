"""What one ATen call means while a model is traced, whichever way the call was seen.

What depends on no path is computed on the spot (attention masks, rotary tables), what is made from
parameters alone is kept as a recipe, what carries paths is turned into steps by the table in
`rules`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from paikern.pathgraph import rules
from paikern.pathgraph.graph import AttentionValue, DataValue, ParamValue, PathValue
from paikern.pathgraph.tracer import Tracer

# Bookkeeping of torch.export: no tensor flows through these.
IGNORED = frozenset(
    {
        "aten._assert_tensor_metadata",
        "aten._assert_scalar",
        "aten.sym_constrain_range_for_size",
        "aten._assert_async",
    }
)


def parameter(name: str, shape: Sequence[int]) -> ParamValue:
    """The parameter `name`, whole and as stored."""
    return ParamValue(lambda state: state[name], tuple(shape), parameter=name)


def user_input(tracer: Tracer, value: Any) -> Any:
    """Paths begin at floating inputs; integer ones (token ids) are used as they are."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return tracer.new_input(tuple(value.shape))
    return DataValue(value)


def call(tracer: Tracer, target: Any, args: Any, kwargs: Any, where: str, shapes: Any) -> Any:
    """The result of `target(*args, **kwargs)` in the module `where`.

    `shapes` is the tensor, or the tensors, that the call returns in the model; only their shapes
    are read.
    """
    name = rules.op_name(target)
    if name in IGNORED:
        return None
    tracer.at(where, name, shapes)
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=rules.is_value)
    if any(isinstance(leaf, (PathValue, AttentionValue)) for leaf in leaves):
        return rules.apply(tracer, name, args, kwargs)
    if name == "aten.embedding" and isinstance(args[1], DataValue):
        return tracer.new_input(tuple(shapes.shape))
    if any(isinstance(leaf, ParamValue) for leaf in leaves):
        return _on_parameters(target, name, args, kwargs, shapes)
    return _constant(target, args, kwargs)


def _constant(target: Any, args: Any, kwargs: Any) -> Any:
    """Compute what depends on no path; remember whether it came from an integer input."""
    from_data = False

    def unwrap(x: Any) -> Any:
        nonlocal from_data
        if isinstance(x, DataValue):
            from_data = True
            return x.tensor
        return x

    args, kwargs = pytree.tree_map(unwrap, (args, kwargs), is_leaf=rules.is_value)
    result = target(*args, **kwargs)
    if not from_data:
        return result
    return pytree.tree_map(lambda r: DataValue(r) if isinstance(r, Tensor) else r, result)


def _on_parameters(target: Any, name: str, args: Any, kwargs: Any, value: Any) -> Any:
    """An operation on parameters alone: a view that weight steps understand, or a replay."""

    def evaluate(state: Any, pick: int | None = None) -> Tensor:
        def resolve(x: Any) -> Any:
            if isinstance(x, ParamValue):
                return x.evaluate(state)
            return x.tensor if isinstance(x, DataValue) else x

        a, k = pytree.tree_map(resolve, (args, kwargs), is_leaf=rules.is_value)
        held = [t for t in pytree.tree_leaves((a, k)) if isinstance(t, Tensor)]
        away = next((t.device for t in held if not t.is_cpu), None)
        if away is not None:  # constants were found while tracing, on the CPU
            a, k = pytree.tree_map(lambda t: t.to(away) if isinstance(t, Tensor) else t, (a, k))
        result = target(*a, **k)
        return result if pick is None else result[pick]

    if isinstance(value, (list, tuple)):
        return tuple(
            ParamValue(
                functools.partial(evaluate, pick=i),
                tuple(part.shape),
                **_row_parts(name, args, value, i),
            )
            for i, part in enumerate(value)
        )
    return ParamValue(evaluate, tuple(value.shape), **_view(name, args, tuple(value.shape)))


def _row_parts(name: str, args: Any, parts: Sequence[Tensor], index: int) -> dict[str, Any]:
    """chunk / split of a fused projection along its rows."""
    source = args[0]
    dim = args[2] if len(args) > 2 else 0
    if not isinstance(source, ParamValue) or source.parameter is None or source.transposed or dim:
        return {}
    start = (source.rows[0] if source.rows else 0) + sum(p.shape[0] for p in parts[:index])
    return {"parameter": source.parameter, "rows": (start, start + parts[index].shape[0])}


def _view(name: str, args: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    source = args[0] if args else None
    if not isinstance(source, ParamValue) or source.parameter is None:
        return {}
    same = {"parameter": source.parameter, "rows": source.rows, "transposed": source.transposed}
    if name in rules.COPIES and shape == source.shape:
        return same
    swapped = name in {"aten.t", "aten.transpose", "aten.permute"} and len(shape) == 2
    if swapped and shape == source.shape[::-1]:
        return {**same, "transposed": not source.transposed}
    if name in {"aten.slice", "aten.narrow"} and not source.transposed:
        start, stop = rules.slice_range(name, args, source.shape)
        dim = args[1] if len(args) > 1 else 0
        if dim == 0 and stop - start == shape[0]:
            base = source.rows[0] if source.rows else 0
            return {"parameter": source.parameter, "rows": (base + start, base + stop)}
    return {}
