"""Tracing by `torch.export`: every model that can be exported, at 200 ms and more a trace."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from paikern._names import slots
from paikern.pathgraph import interpret
from paikern.pathgraph.tracer import Tracer


def read(exported: Any, skeleton: nn.Module, tracer: Tracer) -> list[Any]:
    """Interpret the program `torch.export` made of `skeleton`; the values of its outputs.

    Raises:
        PathRuleError: an operation has no path rule.
    """
    signature = exported.graph_signature
    names = _canonical_names(skeleton)
    buffers = dict(skeleton.named_buffers(remove_duplicate=False))
    constants = {**exported.constants}
    given = iter(pytree.tree_leaves(exported.example_inputs))
    inputs: list[Any] = []
    for spec in signature.input_specs:
        kind = spec.kind.name
        if kind == "PARAMETER":
            shape = skeleton.get_parameter(spec.target).shape
            inputs.append(interpret.parameter(names[spec.target], shape))
        elif kind == "BUFFER":
            tracer.buffer_names[id(buffers[spec.target])] = spec.target
            inputs.append(buffers[spec.target])
        elif kind == "USER_INPUT":
            inputs.append(interpret.user_input(tracer, next(given)))
        else:
            inputs.append(constants[spec.target])
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    level = torch._C._functorch.maybe_current_level() or 0
    try:
        outputs = _run(tracer, exported.graph_module, dict(zip(placeholders, inputs, strict=True)))
    finally:  # a program may enter vmap by calls of its own, and an error keep it from leaving
        while (torch._C._functorch.maybe_current_level() or 0) > level:
            torch._C._functorch._vmap_decrement_nesting()
    wanted = {
        spec.arg.name
        for spec in signature.output_specs
        if spec.kind.name == "USER_OUTPUT" and hasattr(spec.arg, "name")
    }
    return [value for name, value in outputs if name in wanted]


def program(skeleton: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The exported program of `skeleton` on these inputs."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(_is_no_failure)
    try:
        return torch.export.export(skeleton, tuple(args), dict(kwargs), strict=False)
    finally:
        log.removeFilter(_is_no_failure)


def _is_no_failure(record: logging.LogRecord) -> bool:
    """A page of traceback goes to stderr before the error that says the same is raised."""
    return "failed while attempting to run meta" not in str(record.msg)


def _canonical_names(skeleton: nn.Module) -> dict[str, str]:
    """Names in `named_parameters()` -> the first that masks use, so that tied weights have one."""
    first: dict[int, str] = {}
    return {s.source: first.setdefault(id(s.tensor), s.name) for s in slots(skeleton)}


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
    stack = node.meta.get("nn_module_stack") or {}
    where = next(reversed(stack.values()))[0] if stack else ""
    return interpret.call(tracer, target, args, kwargs, where, node.meta.get("val"))
