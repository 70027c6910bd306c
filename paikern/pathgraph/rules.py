"""What each ATen operation means for a path: one table, one short rule an entry.

A rule is called as `rule(tracer, args, kwargs)` when at least one argument carries paths, and
returns what the result is. Families share a rule: activations are identity, views are replayed,
products with constants are scalings. `register_path_rule` adds to the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from paikern.pathgraph import steps
from paikern.pathgraph.graph import AttentionValue, DataValue, ParamValue, PathValue
from paikern.pathgraph.tracer import Tracer

Rule = Callable[[Tracer, tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[str, Rule] = {}

COPIES = frozenset(
    "aten." + name
    for name in [
        "alias",
        "clone",
        "contiguous",
        "detach",
        "detach_",
        "lift_fresh",
        "lift_fresh_copy",
        "to",
        "_to_copy",
        "type_as",
        "float",
    ]
)
_ACTIVATIONS = [
    "relu",
    "relu_",
    "relu6",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "rrelu",
    "elu",
    "elu_",
    "celu",
    "selu",
    "gelu",
    "silu",
    "silu_",
    "mish",
    "hardswish",
    "hardswish_",
    "hardsigmoid",
    "hardsigmoid_",
    "sigmoid",
    "tanh",
    "softplus",
    "softsign",
    "logsigmoid",
    "log_sigmoid",
    "dropout",
    "dropout_",
    "feature_dropout",
    "alpha_dropout",
    "native_dropout",
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "neg",
    "abs",
    "square",
    "pow",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "exp",
    "erf",
    "log",
    "log1p",
    "clamp",
    "clamp_",
    "clamp_min",
    "clamp_max",
    "threshold",
    "threshold_",
    "round",
    "floor",
    "sin",
    "cos",
    "logit",
    "sign",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "normalize",
    "nan_to_num",
    "rms_norm_scale",
]
_RECTIFIERS = {"relu", "relu_", "relu6"}


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
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_attention)
    if any(isinstance(leaf, AttentionValue) for leaf in leaves):
        from paikern.pathgraph import attention

        return attention.apply(tracer, name, args, kwargs)
    rule = RULES.get(name)
    if rule is None:
        raise tracer.error("no path rule is registered for this operation")
    return rule(tracer, args, kwargs)


def _is_attention(x: Any) -> bool:
    return isinstance(x, (AttentionValue, PathValue, ParamValue, DataValue))


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        for name in names:
            RULES["aten." + name] = rule
        return rule

    return register


def argument(args: Any, kwargs: Any, index: int, name: str, default: Any = None) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


# --- identity ---------------------------------------------------------------------------------


def _identity(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    x = args[0]
    if not isinstance(x, PathValue):
        raise tracer.error("the argument that carries paths is not its input")
    return tracer.identity(x)


for _name in _ACTIVATIONS:
    RULES["aten." + _name] = _identity
for _name in COPIES:
    RULES[_name] = _identity


def _rectify(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    return tracer.rectify(args[0])


for _name in _RECTIFIERS:
    RULES["aten." + _name] = _rectify


@_rule("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty",
       "empty_like", "rand_like", "randn_like")  # fmt: skip
def _fresh(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    fill = 0.0 if "zeros" in tracer.op or "empty" in tracer.op else 1.0
    if "full" in tracer.op:
        fill = args[2] if "new" in tracer.op else args[1]
    dtype = kwargs.get("dtype") or torch.float32
    return torch.full(tracer.out_shape, fill, dtype=dtype)


# --- norms ------------------------------------------------------------------------------------


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
    return tracer._emit(
        steps.Norm, [x], x.shape, shape, tracer.reader(weight), tracer.reader(bias),
        tracer.reader(mean), tracer.reader(var), eps,
    )  # fmt: skip


def _per_channel(x: PathValue) -> tuple[int, ...]:
    return (1, x.shape[1]) + (1,) * (len(x.shape) - 2)


@_rule("batch_norm", "instance_norm")
def _batch_norm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x, weight, bias, mean, var = args[:5]
    return _norm(tracer, x, _per_channel(x), weight, bias, mean, var, args[7])


@_rule("group_norm")
def _group_norm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    weight, bias = argument(args, kwargs, 2, "weight"), argument(args, kwargs, 3, "bias")
    return _norm(tracer, args[0], _per_channel(args[0]), weight, bias)


@_rule("layer_norm", "rms_norm")
def _layer_norm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    weight = argument(args, kwargs, 2, "weight")
    bias = argument(args, kwargs, 3, "bias") if tracer.op == "aten.layer_norm" else None
    return _norm(tracer, args[0], tuple(args[1]), weight, bias)


# --- arithmetic -------------------------------------------------------------------------------


@_rule("add", "add_", "sub", "sub_", "rsub")
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


@_rule("mul", "mul_", "multiply", "div", "div_", "true_divide")
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


@_rule("glu")
def _glu(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x = args[0]
    dim = argument(args, kwargs, 1, "dim", -1) % len(x.shape)
    half = x.shape[dim] // 2
    u = tracer.part(x, dim, 0, half, 1, tracer.out_shape)
    v = tracer.part(x, dim, half, 2 * half, 1, tracer.out_shape)
    return tracer.gate(u, v)


@_rule("masked_fill", "masked_fill_")
def _masked_fill(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    mask = args[1].tensor if isinstance(args[1], DataValue) else args[1]
    if not isinstance(mask, Tensor) or not isinstance(args[0], PathValue):
        raise tracer.error("the mask depends on the activations")
    return tracer.scale(args[0], (~mask).float())


@_rule("where")
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


# --- weights ----------------------------------------------------------------------------------


@_rule("linear")
def _linear(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return _by_matrix(tracer, args[0], args[1], argument(args, kwargs, 2, "bias"), stored_out=True)


@_rule("addmm")
def _addmm(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return _by_matrix(tracer, args[1], args[2], args[0], stored_out=False)


def _by_matrix(tracer: Tracer, x: Any, w: Any, bias: Any, *, stored_out: bool) -> PathValue:
    """`x @ W` for a parameter, stored `[out, in]` or `[in, out]`."""
    if not isinstance(x, PathValue):
        raise tracer.error("the activation takes the place of the weight")
    stored_in_out = isinstance(w, ParamValue) and w.transposed == stored_out
    return tracer.weight(x, w, kind="linear", transposed=stored_in_out, bias=tracer.reader(bias))


@_rule("matmul", "mm", "bmm")
def _matmul(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    u, v = args[0], args[1]
    if isinstance(u, PathValue) and isinstance(v, PathValue):
        return AttentionValue(
            tracer.without_scalar(u), tracer.permute_last(tracer.without_scalar(v)),
            tracer.out_shape,
        )  # fmt: skip
    if isinstance(u, PathValue) and isinstance(v, ParamValue) and v.parameter and len(v.shape) == 2:
        return _by_matrix(tracer, u, v, None, stored_out=False)
    if isinstance(u, PathValue) and isinstance(v, (Tensor, DataValue)):
        right = (v.tensor if isinstance(v, DataValue) else v).abs().float()
        return tracer.replay(u, lambda x: torch.matmul(x, right.to(x)))
    if isinstance(v, PathValue) and isinstance(u, (Tensor, DataValue)):
        left = (u.tensor if isinstance(u, DataValue) else u).abs().float()
        return tracer.replay(v, lambda x: torch.matmul(left.to(x), x))
    raise tracer.error("a product with a batch of parameters is not supported")


@_rule("baddbmm")
def _baddbmm(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    from paikern.pathgraph import attention

    scores = _matmul(tracer, args[1:3], {})
    if isinstance(scores, AttentionValue) and not isinstance(args[0], PathValue):
        return attention.masked(scores, args[0])
    return scores


_CONV_SPATIAL = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


@_rule("conv1d", "conv2d", "conv3d")
def _conv(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    n = _CONV_SPATIAL[tracer.op.removeprefix("aten.")]
    x, w, bias = args[0], args[1], argument(args, kwargs, 2, "bias")
    stride = _tuple(argument(args, kwargs, 3, "stride", 1), n)
    padding = argument(args, kwargs, 4, "padding", 0)
    dilation = _tuple(argument(args, kwargs, 5, "dilation", 1), n)
    groups = argument(args, kwargs, 6, "groups", 1)
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            pads = [p for r in reversed(reach) for p in (r // 2, r - r // 2)]
            shape = (*x.shape[:-n], *(s + r for s, r in zip(x.shape[-n:], reach, strict=True)))
            x = tracer.pad(x, pads, shape)
            padding = 0
        else:
            padding = [r // 2 for r in reach] if padding == "same" else 0
    return tracer.weight(
        x, w, kind="conv", transposed=False, stride=stride, padding=_tuple(padding, n),
        dilation=dilation, groups=groups, bias=tracer.reader(bias),
    )  # fmt: skip


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    n = int(tracer.op[-2])
    return tracer.weight(
        args[0], args[1], kind="conv", transposed=True,
        stride=_tuple(argument(args, kwargs, 3, "stride", 1), n),
        padding=_tuple(argument(args, kwargs, 4, "padding", 0), n),
        dilation=_tuple(argument(args, kwargs, 7, "dilation", 1), n),
        groups=argument(args, kwargs, 6, "groups", 1),
        bias=tracer.reader(argument(args, kwargs, 2, "bias")),
    )  # fmt: skip


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * (n if len(value) == 1 else 1)


@_rule("scaled_dot_product_attention")
def _sdpa(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    from paikern.pathgraph import attention

    mask = argument(args, kwargs, 3, "attn_mask")
    causal = argument(args, kwargs, 5, "is_causal", False)
    q, k, v = args[:3]
    if not all(isinstance(t, PathValue) for t in (q, k, v)):
        raise tracer.error("queries, keys and values must all depend on the input")
    visible = attention.visibility(mask)
    if causal:
        lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        visible = lower if visible is None else visible & lower
    return attention.attend(tracer, q, k, v, visible)


# --- pools ------------------------------------------------------------------------------------


@_rule("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices")
def _max_pool(tracer: Tracer, args: Any, kwargs: Any) -> Any:
    x = args[0]
    n = int(tracer.op.removesuffix("_with_indices")[-2])
    kernel = _tuple(args[1], n)
    stride = argument(args, kwargs, 2, "stride") or kernel
    pooled = tracer._emit(
        steps.MaxPool, [x], tracer.out_shape, x.shape, tracer.out_shape, n, kernel,
        _tuple(stride, n), _tuple(argument(args, kwargs, 3, "padding", 0), n),
        _tuple(argument(args, kwargs, 4, "dilation", 1), n),
        bool(argument(args, kwargs, 5, "ceil_mode", False)),
    )  # fmt: skip
    return (pooled, None) if "indices" in tracer.op else pooled


@_rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
def _adaptive_avg_pool(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x, n = args[0], int(tracer.op[-2])
    if tracer.out_shape == x.shape:
        return tracer.identity(x)
    if math.prod(tracer.out_shape[-n:]) == 1:
        return tracer.mean(x, range(-n, 0), average=True)
    return _replay_with(tracer, args, kwargs)


@_rule("mean", "sum")
def _mean(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    dims = argument(args, kwargs, 1, "dim")
    dims = [dims] if isinstance(dims, int) else (dims or [])
    return tracer.mean(args[0], dims, average=tracer.op == "aten.mean")


@_rule("var", "std", "norm", "linalg_vector_norm")
def _spread(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    """Only ever divides its own tensor: a function of it, whatever its size."""
    return tracer.new_function(args[0])


# --- the rest is replayed ---------------------------------------------------------------------

_LINEAR_REPLAYS = [
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact2d",
    "_upsample_bilinear2d_aa",
    "roll",
    "flip",
    "index_select",
    "repeat",
    "repeat_interleave",
    "tile",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "im2col",
    "col2im",
    "unfold",
    "cumsum",
    "tril",
    "triu",
    "diagonal",
    "gather",
    "index",
    "native_channel_shuffle",
    "rot90",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "interpolate",
]
_MAX_REPLAYS = ["amax", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max"]


def _replay_with(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    """Run the ATen operation itself on the counts, with the other arguments as they were."""
    packet = getattr(torch.ops.aten, tracer.op.removeprefix("aten."))
    rest = pytree.tree_map(
        lambda a: a.tensor if isinstance(a, DataValue) else a, (args[1:], kwargs),
        is_leaf=_is_attention,
    )  # fmt: skip
    if not isinstance(args[0], PathValue) or any(
        isinstance(leaf, (PathValue, ParamValue)) for leaf in pytree.tree_leaves(rest)
    ):
        raise tracer.error("only its first argument may carry paths")
    takes_first = tracer.op.startswith(("aten.max", "aten.adaptive_max"))

    def run(x: Tensor) -> Tensor:
        y = packet(x, *rest[0], **rest[1])
        return y[0] if isinstance(y, tuple) else y  # type: ignore[no-any-return]

    maximum = tracer.op.removeprefix("aten.") in _MAX_REPLAYS
    out = tracer.replay(args[0], run, keep_input=maximum)
    return (out, None) if takes_first and len(tracer.out_shapes) > 1 else out  # type: ignore


for _name in _LINEAR_REPLAYS + _MAX_REPLAYS:
    RULES["aten." + _name] = _replay_with


@_rule("pad", "constant_pad_nd")
def _pad(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    mode = argument(args, kwargs, 2, "mode", "constant")
    if isinstance(mode, str) and mode != "constant":
        pads = list(args[1])
        return tracer.replay(args[0], lambda x: torch.nn.functional.pad(x, pads, mode=mode))
    return tracer.pad(args[0], list(args[1]), tracer.out_shape)


# --- views ------------------------------------------------------------------------------------


@_rule("view", "reshape", "_unsafe_view", "_reshape_alias", "flatten", "unflatten", "squeeze",
       "squeeze_", "unsqueeze", "unsqueeze_", "view_as", "reshape_as", "atleast_2d")  # fmt: skip
def _reshape(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return tracer.reshape(args[0], tracer.out_shape)


@_rule("permute")
def _permute(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return tracer.permute(args[0], args[1])


@_rule("transpose", "transpose_", "swapaxes", "swapdims", "t", "t_", "mT", "movedim")
def _transpose(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x = args[0]
    dims = list(range(len(x.shape)))
    if tracer.op == "aten.movedim":
        # A probe whose sizes are all different says where each dimension went.
        probe = torch.empty([d + 2 for d in dims], device="meta").movedim(*args[1:])
        return tracer.permute(x, [size - 2 for size in probe.shape])
    a, b = (0, 1) if len(args) < 3 else (args[1], args[2])
    if tracer.op == "aten.t" and len(dims) < 2:
        return x  # type: ignore[no-any-return]
    dims[a], dims[b] = dims[b], dims[a]
    return tracer.permute(x, dims)


@_rule("expand", "expand_as", "broadcast_to")
def _expand(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    return tracer.expand(args[0], tracer.out_shape)


@_rule("slice", "narrow")
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


@_rule("select")
def _select(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    x, dim = args[0], args[1] % len(args[0].shape)
    index = args[2] % x.shape[dim]
    return tracer.part(x, dim, index, index + 1, 1, tracer.out_shape)


@_rule("chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_chunk",
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


@_rule("cat", "concat", "concatenate", "stack")
def _cat(tracer: Tracer, args: Any, kwargs: Any) -> PathValue:
    tensors = list(args[0])
    dim = argument(args, kwargs, 1, "dim", 0) % len(tracer.out_shape)
    shapes = [_shape(t) for t in tensors]
    if tracer.op == "aten.stack":
        shapes = [s[:dim] + (1,) + s[dim:] for s in shapes]
        tensors = [
            tracer.reshape(t, s) if isinstance(t, PathValue) else t
            for t, s in zip(tensors, shapes, strict=True)
        ]
    carries = tuple(isinstance(t, PathValue) for t in tensors)
    sources = [t for t in tensors if isinstance(t, PathValue)]
    return tracer._emit(steps.Cat, sources, tracer.out_shape, dim, tuple(shapes), carries)


def _shape(value: Any) -> tuple[int, ...]:
    tensor = value.tensor if isinstance(value, DataValue) else value
    return tuple(tensor.shape)
