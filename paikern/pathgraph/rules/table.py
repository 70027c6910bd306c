"""The table of path rules: what each ATen operation means for a path.

A rule is called as `rule(tracer, args, kwargs)` when at least one argument carries paths, and
returns what the result is. `register_path_rule` adds to the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from paikern.pathgraph.graph import AttentionValue, DataValue, ParamValue, PathValue
from paikern.pathgraph.tracer import Tracer

Rule = Callable[[Tracer, tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[str, Rule] = {}


def op_name(target: Any) -> str:
    """`aten.add.Tensor` and `aten.add.Scalar` are both "aten.add"; a string is taken as it is."""
    if isinstance(target, str):
        return target
    packet = getattr(target, "_overloadpacket", target)
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return str(packet)
    return getattr(target, "__name__", str(target))


def register_path_rule(aten_op: Any) -> Callable[[Rule], Rule]:
    """Teach the path engine an operation.

    Args:
        aten_op: the operation, such as `torch.ops.aten.relu`, `torch.ops.mylib.op` or their name
            ("aten.relu"). A rule that exists is replaced.

    The decorated function receives `(tracer, args, kwargs)`; arguments that carry paths are
    `PathValue`s. It returns a `PathValue`, usually from `tracer.identity`, `tracer.replay`,
    `tracer.scale`, `tracer.add` or `tracer.gate`.

    Example:
        >>> import torch
        >>> @register_path_rule("mylib.shifted_relu")
        ... def shifted_relu(tracer, args, kwargs):
        ...     return tracer.identity(args[0])
    """

    def register(rule: Rule) -> Rule:
        RULES[op_name(aten_op)] = rule
        return rule

    return register


def apply(tracer: Tracer, name: str, args: Any, kwargs: Any) -> Any:
    """The result of a call with at least one argument that carries paths."""
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=is_value)
    if any(isinstance(leaf, AttentionValue) for leaf in leaves):
        from paikern.pathgraph.rules import attention

        return attention.apply(tracer, name, args, kwargs)
    found = RULES.get(name)
    if found is None:
        raise tracer.error("no path rule is registered for this operation")
    return found(tracer, args, kwargs)


def is_value(x: Any) -> bool:
    return isinstance(x, (AttentionValue, PathValue, ParamValue, DataValue))


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES["aten." + name] = rule
        return rule

    return register


def argument(args: Any, kwargs: Any, index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def per_dimension(value: Any, n: int) -> tuple[int, ...]:
    """Kernel sizes, strides and the like, which ATen gives once or once per dimension."""
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * (n if len(value) == 1 else 1)
