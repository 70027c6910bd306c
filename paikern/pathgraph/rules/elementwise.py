"""Activations, norms, sums and products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern.pathgraph import steps
from paikern.pathgraph.graph import DataValue, ParamValue, PathValue
from paikern.pathgraph.rules.table import RULES, argument, rule
from paikern.pathgraph.tracer import Tracer

COPIES = frozenset(
    "aten." + name
    for name in (
        "alias clone contiguous detach detach_ lift_fresh lift_fresh_copy to _to_copy type_as float"
    ).split()
)
_ACTIVATIONS = (
    "relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ rrelu elu elu_ celu selu "
    "gelu silu silu_ mish hardswish hardswish_ hardsigmoid hardsigmoid_ sigmoid tanh softplus "
    "softsign logsigmoid log_sigmoid dropout dropout_ feature_dropout alpha_dropout native_dropout "
    "neg abs square pow sqrt rsqrt reciprocal exp erf "
    "log log1p clamp clamp_ clamp_min clamp_max threshold threshold_ round floor sin cos "
    "logit sign tanhshrink hardshrink softshrink nan_to_num"
).split()
_SOFTMAX = ("softmax", "_softmax", "log_softmax", "_log_softmax")
_RECTIFIERS = ("relu", "relu_", "relu6")


def _identity(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, PathValue):
        raise tracer.error("the argument that carries paths is not its input")
    return tracer.identity(x)


for _name in _ACTIVATIONS:
    RULES["aten." + _name] = _identity
for _name in COPIES:
    RULES[_name] = _identity


def _softmax(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    """An activation; the sum that it divides by is recorded, though no path goes through it."""
    x: PathValue = _identity(tracer, args, kwargs)
    dim = argument(args, kwargs, 1, "dim", -1) % len(x.shape)
    shape = tuple(1 if d == dim else n for d, n in enumerate(x.shape))
    tracer.emit(steps.Mean, [x], shape, x.shape, (dim,), shape, False)
    return x


for _name in _SOFTMAX:
    RULES["aten." + _name] = _softmax


def _rectify(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    return tracer.rectify(args[0])


for _name in _RECTIFIERS:
    RULES["aten." + _name] = _rectify


@rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty",
       "empty_like", "rand_like", "randn_like")  # fmt: skip
def _fresh(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    fill = 0.0 if "zeros" in tracer.op or "empty" in tracer.op else 1.0
    if "full" in tracer.op:
        fill = args[2] if "new" in tracer.op else args[1]
    dtype = kwargs.get("dtype") or torch.float32
    return torch.full(tracer.out_shape, fill, dtype=dtype)


def _norm(
    tracer: Tracer,
    x: PathValue,
    shape: tuple[int, ...],
    weight: Any,
    bias: Any,
    mean: Any = None,
    var: Any = None,
    eps: float = 0.0,
) -> PathValue:
    return tracer.emit(
        steps.Norm, [x], x.shape, shape, tracer.reader(weight), tracer.reader(bias),
        tracer.reader(mean), tracer.reader(var), eps,
    )  # fmt: skip


def _per_channel(x: PathValue) -> tuple[int, ...]:
    return (1, x.shape[1]) + (1,) * (len(x.shape) - 2)


@rule("batch_norm", "instance_norm")
def _batch_norm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x, weight, bias, mean, var = args[:5]
    return _norm(tracer, x, _per_channel(x), weight, bias, mean, var, args[7])


@rule("group_norm")
def _group_norm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    return _norm(tracer, args[0], _per_channel(args[0]), weight, bias)


@rule("layer_norm", "rms_norm")
def _layer_norm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    weight = argument(args, kwargs, 2, "weight")
    bias = argument(args, kwargs, 3, "bias") if tracer.op == "aten.layer_norm" else None
    return _norm(tracer, args[0], tuple(args[1]), weight, bias)


@rule("prelu")
def _prelu(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    """An activation; that it has a number for every channel is recorded."""
    x: PathValue = _identity(tracer, args, kwargs)
    weight = args[1]
    if isinstance(weight, ParamValue) and max(weight.shape, default=1) > 1:
        _norm(tracer, x, _per_channel(x), weight, None)
    return x


@rule("add", "add_", "sub", "sub_", "rsub")
def _add(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    """Sums of branches; what carries no path (biases, positions) adds none."""
    alpha = argument(args, kwargs, 2, "alpha", 1)
    u, v = args[0], args[1]
    if isinstance(v, PathValue) and alpha not in (1, -1):
        v = tracer.scale(v, alpha)
    if isinstance(u, PathValue) and isinstance(v, PathValue):
        centring = "sub" in tracer.op and u.root == v.root and v.shape != u.shape
        return u if centring else tracer.add([u, v])
    x = u if isinstance(u, PathValue) else v
    return tracer.expand(x, tracer.out_shape)


@rule("mul", "mul_", "multiply", "div", "div_", "true_divide")
def _mul(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    u, v = args[0], args[1]
    if isinstance(u, PathValue) and isinstance(v, PathValue):
        return tracer.gate(u, v)
    x, factor = (u, v) if isinstance(u, PathValue) else (v, u)
    if "div" in tracer.op:
        if x is v:  # constant / x: an activation
            return tracer.expand(x, tracer.out_shape)
        factor = _invert(factor)
    return tracer.scale(x, factor)


def _invert(factor: Any) -> Any:
    if isinstance(factor, ParamValue):
        inner = factor.evaluate
        return ParamValue(lambda state: inner(state).reciprocal(), factor.shape)
    if isinstance(factor, DataValue):
        return factor.tensor.reciprocal()
    return 1.0 / factor


@rule("glu")
def _glu(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", -1) % len(x.shape)
    half = x.shape[dim] // 2
    u = tracer.part(x, dim, 0, half, 1, tracer.out_shape)
    v = tracer.part(x, dim, half, 2 * half, 1, tracer.out_shape)
    return tracer.gate(u, v)


@rule("masked_fill", "masked_fill_")
def _masked_fill(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    mask = args[1].tensor if isinstance(args[1], DataValue) else args[1]
    if not isinstance(mask, Tensor) or not isinstance(args[0], PathValue):
        raise tracer.error("the mask depends on the activations")
    return tracer.scale(args[0], (~mask).float())


@rule("where")
def _where(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    condition = args[0].tensor if isinstance(args[0], DataValue) else args[0]
    if not isinstance(condition, Tensor):
        raise tracer.error("the condition depends on the activations")
    branches = [
        tracer.scale(x, side.float())
        for x, side in ((args[1], condition), (args[2], ~condition))
        if isinstance(x, PathValue)
    ]
    return branches[0] if len(branches) == 1 else tracer.add(branches)
