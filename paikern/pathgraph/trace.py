"""Model -> `PathGraph`, through `torch.export`.

The model itself is never touched: a skeleton with the same modules and empty parameters is
exported, so weights may live on any device, meta included, and nothing has to be restored when a
model refuses to be traced. The exported ATen graph is then read once, operation by operation:
what depends on no path is computed on the spot (attention masks, rotary tables), what carries
paths is turned into steps by the table in `rules.py`.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from paikern.errors import PathRuleError
from paikern.pathgraph import rules
from paikern.pathgraph.graph import (
    AttentionValue,
    DataValue,
    ParamValue,
    PathGraph,
    PathValue,
)
from paikern.pathgraph.tracer import Tracer

# Bookkeeping of torch.export: no tensor flows through these.
_IGNORED = frozenset(
    {
        "aten._assert_tensor_metadata",
        "aten._assert_scalar",
        "aten.sym_constrain_range_for_size",
        "aten._assert_async",
    }
)


def trace(model: nn.Module, example_inputs: Any) -> PathGraph:
    """Trace `model` on one sample of `example_inputs` into a `PathGraph`.

    Args:
        model: any module that `torch.export` can export; parameters on any device, meta included.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. The
            first dimension is the batch; only shapes matter for floating inputs (they count as
            ones), integer inputs such as token ids are used as they are. One sample is used.

    Returns:
        The graph. Floating outputs are summed; other outputs are ignored.

    Raises:
        PathRuleError: an operation has no path rule; names the operation and its module.
        ValueError: `example_inputs` is missing or does not run through the model.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> trace(net, torch.ones(1, 3))
        PathGraph(3 steps, 2 weights)
    """
    args, kwargs = _one_sample(example_inputs)
    skeleton = _skeleton(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            exported = torch.export.export(skeleton, args, kwargs, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"example_inputs: {type(model).__name__} could not be traced with inputs "
            f"{_describe(args, kwargs)}: {reason[0] if reason else type(error).__name__}; "
            "pass inputs that model(*example_inputs) accepts"
        ) from error
    return _read(exported, model, skeleton)


def _one_sample(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is None:
        raise ValueError(
            "example_inputs: a path-based method needs one example input to trace the model, "
            "for instance example_inputs=torch.ones(1, 3, 32, 32)"
        )

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sample = value[:1] if value.dim() > 1 else value
        if sample.is_meta:
            return torch.zeros(sample.shape, dtype=sample.dtype)
        return sample.detach().to("cpu").clone()

    if isinstance(example_inputs, Mapping):
        return (), {name: pytree.tree_map(first, value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, Tensor):
        return (first(example_inputs),), {}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(pytree.tree_map(first, value) for value in example_inputs), {}
    raise ValueError(
        "example_inputs must be a tensor, a tuple of inputs or a dict of keyword inputs, "
        f"got {type(example_inputs).__name__}"
    )


def _describe(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    return ", ".join(str(tuple(x.shape)) for x in leaves if isinstance(x, Tensor)) or "(none)"


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters are allocated but never written.

    Untouched pages cost no memory, so this is free for any size; buffers are copied because they
    may hold what a constant is computed from.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = (
            torch.zeros(buffer.shape, dtype=buffer.dtype)
            if buffer.is_meta
            else buffer.detach().to("cpu").clone()
        )
    skeleton = copy.deepcopy(model, memo).eval()
    config = getattr(skeleton, "config", None)
    if config is not None and getattr(config, "use_cache", False):
        config.use_cache = False  # cached keys and values are no outputs of the network
    return skeleton


def _read(exported: Any, model: nn.Module, skeleton: nn.Module) -> PathGraph:
    tracer = Tracer()
    signature = exported.graph_signature
    names = _canonical_names(skeleton)
    buffers = dict(skeleton.named_buffers(remove_duplicate=False))
    constants = {**exported.constants}
    given = iter(pytree.tree_leaves(exported.example_inputs))
    env: dict[Any, Any] = {}
    inputs: list[Any] = []
    for spec in signature.input_specs:
        kind = spec.kind.name
        if kind == "PARAMETER":
            inputs.append(_parameter(names[spec.target], skeleton))
        elif kind == "BUFFER":
            tracer.buffer_names[id(buffers[spec.target])] = spec.target
            inputs.append(buffers[spec.target])
        elif kind == "USER_INPUT":
            inputs.append(_user_input(tracer, next(given)))
        else:
            inputs.append(constants[spec.target])
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    env.update(zip(placeholders, inputs, strict=True))
    outputs = _run(tracer, exported.graph_module, env)
    wanted = {
        spec.arg.name
        for spec in signature.output_specs
        if spec.kind.name == "USER_OUTPUT" and hasattr(spec.arg, "name")
    }
    found = [v for name, v in outputs if isinstance(v, PathValue) and name in wanted]
    if not found:
        raise ValueError(
            f"{type(model).__name__}: no floating output depends on the input, "
            "so there are no paths to count"
        )
    return PathGraph(
        steps=tuple(_alive(tracer, [v.id for v in found])),
        inputs=dict(tracer.inputs),
        outputs=tuple(dict.fromkeys(v.id for v in found)),
        notes=tuple(tracer.notes),
    )


def _alive(tracer: Tracer, outputs: list[int]) -> list[Any]:
    """Steps that reach an output; what is left over (a pruned auxiliary head) never runs."""
    needed = set(outputs)
    kept = []
    for step in reversed(tracer.steps):
        if step.output in needed:
            needed.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _canonical_names(skeleton: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> its first name, so that tied weights have one."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in skeleton.named_parameters(remove_duplicate=False)
    }


def _parameter(name: str, skeleton: nn.Module) -> ParamValue:
    shape = tuple(skeleton.get_parameter(name).shape)
    return ParamValue(lambda state: state[name], shape, parameter=name)


def _user_input(tracer: Tracer, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return tracer.new_input(tuple(value.shape))
    return DataValue(value)


def _run(tracer: Tracer, module: Any, env: dict[Any, Any]) -> list[tuple[str, Any]]:
    """Interpret a graph module; returns (node name, value) of every output."""

    def value_of(node: Any) -> Any:
        return env[node]

    outputs: list[tuple[str, Any]] = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            env[node] = getattr(module, node.target)
        elif node.op == "call_function":
            args = torch.fx.map_arg(node.args, value_of)
            kwargs = torch.fx.map_arg(node.kwargs, value_of)
            env[node] = _call(tracer, node, args, kwargs)
        elif node.op == "output":
            leaves = [n for n in pytree.tree_leaves(node.args) if isinstance(n, torch.fx.Node)]
            outputs = [(n.name, env[n]) for n in leaves]
    return outputs


def _call(tracer: Tracer, node: Any, args: Any, kwargs: Any) -> Any:
    target = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if "wrap_with_set_grad_enabled" in str(target) or "wrap_with_autocast" in str(target):
        inner = next(i for i, a in enumerate(args) if isinstance(a, torch.fx.GraphModule))
        sub = args[inner]
        holders = [n for n in sub.graph.nodes if n.op == "placeholder"]
        results = _run(tracer, sub, dict(zip(holders, args[inner + 1 :], strict=True)))
        return tuple(value for _, value in results)
    name = rules.op_name(target)
    if name in _IGNORED:
        return None
    tracer.at(node, name)
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_value)
    if any(isinstance(leaf, (PathValue, AttentionValue)) for leaf in leaves):
        return rules.apply(tracer, name, args, kwargs)
    if name == "aten.embedding" and isinstance(args[1], DataValue):
        return tracer.new_input(tuple(node.meta["val"].shape))
    if any(isinstance(leaf, ParamValue) for leaf in leaves):
        return _on_parameters(target, name, args, kwargs, node)
    return _constant(target, args, kwargs)


def _is_value(x: Any) -> bool:
    return isinstance(x, (PathValue, AttentionValue, ParamValue, DataValue))


def _constant(target: Any, args: Any, kwargs: Any) -> Any:
    """Compute what depends on no path; remember whether it came from an integer input."""
    from_data = False

    def unwrap(x: Any) -> Any:
        nonlocal from_data
        if isinstance(x, DataValue):
            from_data = True
            return x.tensor
        return x

    args, kwargs = pytree.tree_map(unwrap, (args, kwargs), is_leaf=_is_value)
    result = target(*args, **kwargs)
    if not from_data:
        return result
    return pytree.tree_map(lambda r: DataValue(r) if isinstance(r, Tensor) else r, result)


def _on_parameters(target: Any, name: str, args: Any, kwargs: Any, node: Any) -> Any:
    """An operation on parameters alone: a view that weight steps understand, or a replay."""

    def evaluate(state: Any, pick: int | None = None) -> Tensor:
        def resolve(x: Any) -> Any:
            if isinstance(x, ParamValue):
                return x.evaluate(state)
            return x.tensor if isinstance(x, DataValue) else x

        a, k = pytree.tree_map(resolve, (args, kwargs), is_leaf=_is_value)
        result = target(*a, **k)
        return result if pick is None else result[pick]

    value = node.meta["val"]
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


__all__ = ["PathRuleError", "trace"]
