"""masked_conv2d: a 2-D convolution with a packed weight, and its derivatives.

As for `masked_linear`, the three operations are the three ways to leave out one factor of the same
sum over outputs and kept weights, so that the derivatives of each are the other two, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paikern.backends.dense_masked_conv import format_of, out_size
from paikern.ops._library import autograd, define, fake
from paikern.ops._packed import check_dtype, check_given, check_values
from paikern.ops._path import conv_shape, run
from paikern.ops._transforms import refuse_compiled, register

if TYPE_CHECKING:
    from paikern.sparse.packed_weight import PackedWeight

# As for masked_linear, with rows = out channels and columns = in channels / groups * kernel.
_WHERE = (
    "Tensor positions, Tensor starts, Tensor? t_positions, Tensor? t_starts, Tensor? t_source, "
    "int rows, int columns, int panel, int kept"
)
_CONV = "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups"

define(f"masked_conv2d(Tensor x, Tensor values, Tensor? bias, {_WHERE}, {_CONV}) -> Tensor")
define(f"masked_conv2d_input(Tensor g, Tensor values, {_WHERE}, {_CONV}, SymInt[] size) -> Tensor")
define(f"masked_conv2d_kept(Tensor g, Tensor x, {_WHERE}, {_CONV}) -> Tensor")

Pair = int | Sequence[int]
_INTEGERS = (int, torch.SymInt)


@fake("masked_conv2d")
def _output(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    refuse_compiled("masked_conv2d")
    kernel, stride, padding, dilation = rest[9:13]
    size = out_size(x.shape[2:], kernel, stride, padding, dilation)
    y = x.new_empty((x.shape[0], rest[5], *size))
    return y.contiguous(memory_format=format_of(x))


@fake("masked_conv2d_input")
def _input(g: Tensor, values: Tensor, *rest: Any) -> Tensor:
    kernel, groups, size = rest[9], rest[13], rest[14]
    x = g.new_empty((g.shape[0], rest[6] // (kernel[0] * kernel[1]) * groups, *size))
    return x.contiguous(memory_format=format_of(g))


@fake("masked_conv2d_kept")
def _kept(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return g.new_empty(rest[8])


_NOTHING = (None,) * 14


def _save(ctx: Any, first: Tensor, second: Tensor, rest: Sequence[Any]) -> None:
    ctx.save_for_backward(first, second, *rest[:5])
    ctx.rest = tuple(rest[5:14])


def _saved(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    first, second, *tensors = ctx.saved_tensors
    return first, second, (*tensors, *ctx.rest)


def _setup_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, *rest = inputs
    _save(ctx, x, values, rest)


def _output_derivative(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return *_derivatives(ctx.needs_input_grad, g, *_saved(ctx)), *_NOTHING


def _derivatives(
    wanted: Sequence[bool], g: Tensor, x: Tensor, values: Tensor, rest: tuple[Any, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By x, the values and the bias, each where it is wanted."""
    size = tuple(x.shape[2:])
    return (
        _run("masked_conv2d_input", g, values, *rest, size) if wanted[0] else None,
        _run("masked_conv2d_kept", g, x, *rest) if wanted[1] else None,
        _sum_over_pixels(g) if wanted[2] else None,
    )


def _run(name: str, *args: Any) -> Tensor:
    result: Tensor = run(name, *args, differentiable=True)
    return result


def _sum_over_pixels(g: Tensor) -> Tensor:
    """The sum of every channel in float32, in the same order for any thread count."""
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    # torch adds one single channel in as many parts as there are threads.
    one = wide.shape[1] == 1 and wide.numel() > 0
    total = wide.reshape(-1, 1).cumsum(0)[-1] if one else wide.sum((0, 2, 3))
    return total.to(g.dtype)


def _setup_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, values, *rest = inputs
    _save(ctx, g, values, rest)


def _input_derivative(ctx: Any, u: Tensor) -> tuple[Any, ...]:
    return *_input_derivatives(ctx.needs_input_grad, u, *_saved(ctx))[:2], *_NOTHING, None


def _input_derivatives(
    wanted: Sequence[bool], u: Tensor, g: Tensor, values: Tensor, rest: tuple[Any, ...]
) -> tuple[Tensor | None, Tensor | None, None]:
    rest = rest[:14]  # without the size
    return (
        _run("masked_conv2d", u, values, None, *rest) if wanted[0] else None,
        _run("masked_conv2d_kept", g, u, *rest) if wanted[1] else None,
        None,
    )


def _setup_kept(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, x, *rest = inputs
    _save(ctx, g, x, rest)


def _kept_derivative(ctx: Any, u: Tensor) -> tuple[Any, ...]:
    return *_kept_derivatives(ctx.needs_input_grad, u, *_saved(ctx))[:2], *_NOTHING


def _kept_derivatives(
    wanted: Sequence[bool], u: Tensor, g: Tensor, x: Tensor, rest: tuple[Any, ...]
) -> tuple[Tensor | None, Tensor | None, None]:
    size = tuple(x.shape[2:])
    return (
        _run("masked_conv2d", x, u, None, *rest) if wanted[0] else None,
        _run("masked_conv2d_input", g, u, *rest, size) if wanted[1] else None,
        None,
    )


autograd("masked_conv2d", _output_derivative, _setup_output)
autograd("masked_conv2d_input", _input_derivative, _setup_input)
autograd("masked_conv2d_kept", _kept_derivative, _setup_kept)
_CHANNELS = (-1, 1, 1)
register("masked_conv2d", _derivatives, bias=True, folds=True, spread=_CHANNELS)
register("masked_conv2d_input", _input_derivatives, folds=True, spread=_CHANNELS)
register("masked_conv2d_kept", _kept_derivatives)


def masked_conv2d(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    kernel: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv2d(x, weight.to_dense(), bias, ...)`, the weight as `[out, in / groups, kh, kw]`.

    Args:
        x: `[batch, in, H, W]` or `[in, H, W]`, of the dtype of the weight, any strides. Under
            autocast it, the values and the bias are cast as those of `F.conv2d` are.
        weight: a `PackedWeight` of shape `[out, in / groups, kh, kw]`, or flattened to
            `[out, in / groups * kh * kw]`.
        bias: `[out]` or None, of the same dtype.
        kernel, stride, padding, dilation: one integer or two, (rows, columns). The kernel is that
            of the weight, if it has four axes. Other padding than zeros comes before, with `F.pad`.
        groups: as for `F.conv2d`.

    Returns:
        `[batch, out, H', W']` or `[out, H', W']`, channels_last if x is, the dtype of x. Sums are
        float32 (float64 for float64). Differentiable, any number of times, in x, in
        `weight.values` (the gradient exists at the kept positions only) and in the bias.
        Where the library's dense convolution is measured to be faster
        (`paikern.backends.masked_conv_cost`) it runs on the weight made dense, for the length of
        the call, and the order of its sums is the library's, which may depend on the number of
        threads; that of the kernels here does not. NaN and infinity in x then reach every output
        that has them in its window, else only those with a weight kept for them.

    Raises:
        ValueError: shapes that do not fit, another kernel than that of a weight with four axes,
        tensors on different devices. TypeError: another dtype than that of the weight, a weight
        that is not packed, x or bias that is no dense tensor, numbers that are no integers.

    Example:
        >>> import torch, paikern as pk
        >>> w = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]]]])
        >>> packed = pk.PackedWeight.from_dense(w, w != 0)
        >>> masked_conv2d(torch.arange(6.0).reshape(1, 1, 2, 3), packed, kernel=2).tolist()
        [[[[-2.0, 0.0]]]]
    """
    fix = "make one with PackedWeight.from_dense(weight, mask)"
    values = check_given("masked_conv2d", x, weight, bias, fix)
    kind = values.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and values.dtype != torch.float64:
        wanted = torch.get_autocast_dtype(kind)
        x, values = x.to(wanted), values.to(wanted)
        bias = None if bias is None else bias.to(wanted)
    conv = (
        _pair("kernel", kernel),
        _pair("stride", stride),
        _pair("padding", padding),
        _pair("dilation", dilation),
        _integer("groups", groups),
    )
    _check(x, values, weight, bias, *conv)
    where = weight.where(transposed=torch.is_grad_enabled() and x.requires_grad)
    check_values("masked_conv2d", values, where)
    batched = x if x.dim() == 4 else x[None]
    y = run("masked_conv2d", batched, values, bias, *where, *conv, differentiable=True)
    return y if x.dim() == 4 else y[0]


def _pair(name: str, value: Pair) -> list[int]:
    if isinstance(value, _INTEGERS):
        return [value, value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        pair = list(value)
        if len(pair) == 2 and all(isinstance(entry, _INTEGERS) for entry in pair):
            return pair
        kind: type[Exception] = ValueError
    else:
        kind = TypeError
    raise kind(
        f"masked_conv2d: {name} must be one integer or two, got {value!r}{_fix(name, value)}"
    )


def _integer(name: str, value: int) -> int:
    if isinstance(value, _INTEGERS):
        return value
    raise TypeError(f"masked_conv2d: {name} must be one integer, got {value!r}")


def _fix(name: str, value: Any) -> str:
    if name != "padding" or not isinstance(value, str):
        return ""
    return '; "valid" is 0, "same" is dilation * (kernel - 1) // 2 for an odd kernel and stride 1'


def _check(
    x: Tensor,
    values: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> None:
    rows, columns = weight.rows, weight.columns
    taps = kernel[0] * kernel[1]
    if len(weight.shape) not in (2, 4):
        raise ValueError(
            "masked_conv2d: weight must be [out, in / groups, kh, kw] or [out, in / groups * kh * "
            f"kw], got {tuple(weight.shape)}; pack it in one of these shapes"
        )
    if len(weight.shape) == 4 and tuple(kernel) != tuple(weight.shape[2:]):
        raise ValueError(
            f"masked_conv2d: kernel must be {tuple(weight.shape[2:])} for a weight of shape "
            f"{tuple(weight.shape)}, got {tuple(kernel)}"
        )
    check_dtype("masked_conv2d", values)
    if min(kernel) < 1 or columns % taps:
        raise ValueError(
            f"masked_conv2d: kernel must divide the {columns} columns of the weight, "
            f"in / groups * kh * kw of them, got {tuple(kernel)}"
        )
    if x.dim() not in (3, 4):
        raise ValueError(
            f"masked_conv2d: x must be [batch, in, H, W] or [in, H, W], got {tuple(x.shape)}"
        )
    size = tuple(x.shape) if x.dim() == 4 else (1, *x.shape)
    full = (rows, columns // taps, *kernel)
    conv_shape("masked_conv2d", full, size, stride, padding, dilation, groups)
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(
            f"masked_conv2d: bias must be [{rows}] for a weight of shape {full}, "
            f"got {tuple(bias.shape)}"
        )
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != values.dtype:
            raise TypeError(
                f"masked_conv2d: {name} is {tensor.dtype} and the weight {values.dtype}; "
                "convert one of them or use torch.autocast"
            )
        if tensor.device != values.device:
            raise ValueError(
                f"masked_conv2d: {name} is on {tensor.device} and the weight on {values.device}; "
                "move them to one device"
            )
