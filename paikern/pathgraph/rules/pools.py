"""Pools, and every other operation that is replayed as it is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paikern.pathgraph import steps
from paikern.pathgraph.graph import DataValue, ParamValue, PathValue
from paikern.pathgraph.rules.table import RULES, argument, is_value, per_dimension, rule
from paikern.pathgraph.tracer import Tracer


@rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices")
def _max_pool(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    x = args[0]
    n = int(tracer.op.removesuffix("_with_indices")[-2])
    kernel = per_dimension(args[1], n)
    stride = argument(args, kwargs, 2, "stride") or kernel
    pooled = tracer.emit(
        steps.MaxPool, [x], tracer.out_shape, x.shape, tracer.out_shape, n, kernel,
        per_dimension(stride, n), per_dimension(argument(args, kwargs, 3, "padding", 0), n),
        per_dimension(argument(args, kwargs, 4, "dilation", 1), n),
        bool(argument(args, kwargs, 5, "ceil_mode", False)),
    )  # fmt: skip
    return (pooled, None) if "indices" in tracer.op else pooled


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_avg_pool(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    x, n = args[0], int(tracer.op[-2])
    if tracer.out_shape == x.shape:
        return tracer.identity(x)
    if math.prod(tracer.out_shape[-n:]) == 1:
        return tracer.mean(x, range(-n, 0), average=True)
    return _replay_with(tracer, args, kwargs)


@rule("mean", "sum")
def _mean(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    dims = argument(args, kwargs, 1, "dim")
    dims = [dims] if isinstance(dims, int) else (dims or [])
    return tracer.mean(args[0], dims, average=tracer.op == "aten.mean")


@rule("var", "std", "norm", "linalg_vector_norm")
def _spread(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    """Only ever divides its own tensor: a function of it, whatever its size."""
    return tracer.new_function(args[0])


_LINEAR_REPLAYS = (
    "avg_pool1d avg_pool2d avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d _upsample_nearest_exact2d "
    "_upsample_bilinear2d_aa roll flip index_select repeat repeat_interleave tile pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im unfold cumsum tril triu "
    "diagonal gather index rot90 reflection_pad1d reflection_pad2d replication_pad1d "
    "replication_pad2d"
).split()
_MAX_REPLAYS = "amax adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max".split()


def _replay_with(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    """Run the ATen operation itself on the counts, with the other arguments as they were."""
    packet = getattr(torch.ops.aten, tracer.op.removeprefix("aten."))
    rest = pytree.tree_map(
        lambda a: a.tensor if isinstance(a, DataValue) else a, (args[1:], kwargs),
        is_leaf=is_value,
    )  # fmt: skip
    if not isinstance(args[0], PathValue) or any(
        isinstance(leaf, (PathValue, ParamValue)) for leaf in pytree.tree_leaves(rest)
    ):
        raise tracer.error("only its first argument may carry paths")
    takes_first = tracer.op.startswith(("aten.max", "aten.adaptive_max"))

    def run(x: Tensor) -> Tensor:
        a, k = rest
        if not x.is_cpu:  # indices were found while tracing, on the CPU
            a, k = pytree.tree_map(lambda t: t.to(x.device) if isinstance(t, Tensor) else t, rest)
        y = packet(x, *a, **k)
        return y[0] if isinstance(y, tuple) else y

    maximum = tracer.op.removeprefix("aten.") in _MAX_REPLAYS
    out = tracer.replay(args[0], run, keep_input=maximum)
    return (out, None) if takes_first and len(tracer.out_shapes) > 1 else out


for _name in _LINEAR_REPLAYS + _MAX_REPLAYS:
    RULES["aten." + _name] = _replay_with


@rule("pad", "constant_pad_nd")
def _pad(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    mode = argument(args, kwargs, 2, "mode", "constant")
    if isinstance(mode, str) and mode != "constant":
        pads = list(args[1])
        return tracer.replay(args[0], lambda x: torch.nn.functional.pad(x, pads, mode=mode))
    return tracer.pad(args[0], list(args[1]), tracer.out_shape)
