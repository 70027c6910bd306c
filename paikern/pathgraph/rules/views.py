"""Views: the same counts in another shape or order."""

from __future__ import annotations

from typing import Any

import torch

from paikern.pathgraph import steps
from paikern.pathgraph.graph import DataValue, PathValue
from paikern.pathgraph.rules.table import argument, rule
from paikern.pathgraph.tracer import Tracer


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze",
       "squeeze_", "unsqueeze", "unsqueeze_", "view_as", "reshape_as", "atleast_2d")  # fmt: skip
def _reshape(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return tracer.reshape(args[0], tracer.out_shape)


@rule("permute")
def _permute(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return tracer.permute(args[0], args[1])


@rule("transpose", "transpose_", "swapaxes", "swapdims", "t", "t_", "mT", "movedim")
def _transpose(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x = args[0]
    dims = list(range(len(x.shape)))
    if tracer.op == "aten.movedim":
        # A probe whose sizes are all different says where each dimension went.
        probe = torch.empty([d + 2 for d in dims], device="meta").movedim(*args[1:])
        return tracer.permute(x, [size - 2 for size in probe.shape])
    a, b = (0, 1) if len(args) < 3 else (args[1], args[2])
    if tracer.op == "aten.t" and len(dims) < 2:
        return x
    dims[a], dims[b] = dims[b], dims[a]
    return tracer.permute(x, dims)


@rule("expand", "expand_as", "broadcast_to")
def _expand(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return tracer.expand(args[0], tracer.out_shape)


@rule("slice", "narrow")
def _slice(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x = args[0]
    dim = (args[1] if len(args) > 1 else 0) % len(x.shape)
    start, stop = slice_range(tracer.op, args, x.shape)
    step = args[4] if tracer.op == "aten.slice" and len(args) > 4 else 1
    return tracer.part(x, dim, start, stop, step, tracer.out_shape)


def slice_range(op: str, args: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """Start and stop of aten.slice or aten.narrow, clipped as Python clips them."""
    size = shape[args[1] if len(args) > 1 else 0]
    if op == "aten.narrow":
        start = args[2] % size
        return start, start + args[3]
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    stop = args[3] if len(args) > 3 and args[3] is not None else size
    first, last, _ = slice(start, stop).indices(size)
    return first, max(first, last)


@rule("select")
def _select(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x, dim = args[0], args[1] % len(args[0].shape)
    index = args[2] % x.shape[dim]
    return tracer.part(x, dim, index, index + 1, 1, tracer.out_shape)


@rule("chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_chunk",
       "unsafe_split")  # fmt: skip
def _split(tracer: Tracer, args: Any, kwargs: Any) -> tuple[PathValue, ...]:
    x = args[0]
    position = 1 if tracer.op == "aten.unbind" else 2
    dim = argument(args, kwargs, position, "dim", 0) % len(x.shape)
    parts, start = [], 0
    for shape in tracer.out_shapes:
        width = 1 if tracer.op == "aten.unbind" else shape[dim]
        parts.append(tracer.part(x, dim, start, start + width, 1, shape))
        start += width
    return tuple(parts)


@rule("cat", "concat", "concatenate", "stack")
def _cat(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    tensors = list(args[0])
    dim = argument(args, kwargs, 1, "dim", 0) % len(tracer.out_shape)
    shapes = [_shape(t) for t in tensors]
    if tracer.op == "aten.stack":
        shapes = [(*s[:dim], 1, *s[dim:]) for s in shapes]
        tensors = [
            tracer.reshape(t, s) if isinstance(t, PathValue) else t
            for t, s in zip(tensors, shapes, strict=True)
        ]
    carries = tuple(isinstance(t, PathValue) for t in tensors)
    sources = [t for t in tensors if isinstance(t, PathValue)]
    return tracer.emit(steps.Cat, sources, tracer.out_shape, dim, tuple(shapes), carries)


def _shape(value: Any) -> tuple[int, ...]:
    tensor = value.tensor if isinstance(value, DataValue) else value
    return tuple(tensor.shape)
