"""masked_linear: a linear layer with a packed weight, and its derivatives.

The three operations are the three ways to leave out one factor of the same sum
`sum over n and kept (r, c) of g[n, r] * W[r, c] * x[n, c]`, so that the derivatives of each are the
other two, to any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paikern.backends import registry
from paikern.ops._library import autograd, define, fake
from paikern.ops._packed import check_dtype, check_given, check_values
from paikern.ops._path import nothing_intercepts, run
from paikern.ops._transforms import refuse_compiled, register

if TYPE_CHECKING:
    from paikern.sparse.packed_weight import PackedWeight

# Where the kept weights are: positions (int16 columns, or uint8 bits) and starts as
# `list_positions` makes them, those of the transposed weight if they exist already, and how many.
_WHERE = (
    "Tensor positions, Tensor starts, Tensor? t_positions, Tensor? t_starts, Tensor? t_source, "
    "int rows, int columns, int panel, int kept"
)

define(f"masked_linear(Tensor x, Tensor values, Tensor? bias, {_WHERE}) -> Tensor")
define(f"masked_linear_input(Tensor g, Tensor values, {_WHERE}) -> Tensor")
define(f"masked_linear_kept(Tensor g, Tensor x, {_WHERE}) -> Tensor")


@fake("masked_linear")
def _output(x: Tensor, values: Tensor, bias: Tensor | None, *where: Any) -> Tensor:
    refuse_compiled("masked_linear")
    return x.new_empty((*x.shape[:-1], where[5]))


@fake("masked_linear_input")
def _input(g: Tensor, values: Tensor, *where: Any) -> Tensor:
    refuse_compiled("masked_linear_input")
    return g.new_empty((*g.shape[:-1], where[6]))


@fake("masked_linear_kept")
def _kept(g: Tensor, x: Tensor, *where: Any) -> Tensor:
    return g.new_empty(where[8])


_NOTHING = (None,) * 9
_PLAIN = (Tensor, torch.nn.Parameter)


def _save(ctx: Any, first: Tensor, second: Tensor, where: tuple[Any, ...]) -> None:
    ctx.save_for_backward(first, second, *where[:5])
    ctx.sizes = where[5:]


def _saved(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    first, second, *tensors = ctx.saved_tensors
    return first, second, (*tensors, *ctx.sizes)


def _setup_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, _, *where = inputs
    _save(ctx, x, values, tuple(where))


def _output_derivative(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    return *_derivatives(ctx.needs_input_grad, g, *_saved(ctx)), *_NOTHING


def _derivatives(
    wanted: Sequence[bool], g: Tensor, x: Tensor, values: Tensor, where: tuple[Any, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By x, the values and the bias, each where it is needed."""
    by_x, by_values, by_bias = wanted[:3]
    return (
        run("masked_linear_input", g, values, *where, differentiable=True) if by_x else None,
        run("masked_linear_kept", g, x, *where, differentiable=True) if by_values else None,
        _sum_over_batch(g) if by_bias else None,
    )


def _sum_over_batch(g: Tensor) -> Tensor:
    """The sum over all axes but the last, in float32, in the same order for any thread count."""
    # Not `flatten`: batched gradients have no rule for it.
    flat = g.reshape(math.prod(g.shape[:-1]), g.shape[-1])
    wide = flat.to(torch.promote_types(g.dtype, torch.float32))
    # torch adds one single column in as many parts as there are threads.
    total = wide.cumsum(0)[-1] if wide.shape[1] == 1 and wide.shape[0] > 0 else wide.sum(0)
    return total.to(g.dtype)


def _setup_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, values, *where = inputs
    _save(ctx, g, values, tuple(where))


def _input_derivative(ctx: Any, u: Tensor) -> tuple[Any, ...]:
    return *_input_derivatives(ctx.needs_input_grad, u, *_saved(ctx))[:2], *_NOTHING


def _input_derivatives(
    wanted: Sequence[bool], u: Tensor, g: Tensor, values: Tensor, where: tuple[Any, ...]
) -> tuple[Tensor | None, Tensor | None, None]:
    return (
        run("masked_linear", u, values, None, *where, differentiable=True) if wanted[0] else None,
        run("masked_linear_kept", g, u, *where, differentiable=True) if wanted[1] else None,
        None,
    )


def _setup_kept(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, x, *where = inputs
    _save(ctx, g, x, tuple(where))


def _kept_derivative(ctx: Any, u: Tensor) -> tuple[Any, ...]:
    return *_kept_derivatives(ctx.needs_input_grad, u, *_saved(ctx))[:2], *_NOTHING


def _kept_derivatives(
    wanted: Sequence[bool], u: Tensor, g: Tensor, x: Tensor, where: tuple[Any, ...]
) -> tuple[Tensor | None, Tensor | None, None]:
    return (
        run("masked_linear", x, u, None, *where, differentiable=True) if wanted[0] else None,
        run("masked_linear_input", g, u, *where, differentiable=True) if wanted[1] else None,
        None,
    )


autograd("masked_linear", _output_derivative, _setup_output)
autograd("masked_linear_input", _input_derivative, _setup_input)
autograd("masked_linear_kept", _kept_derivative, _setup_kept)
register("masked_linear", _derivatives, bias=True, folds=True)
register("masked_linear_input", _input_derivatives, folds=True)
register("masked_linear_kept", _kept_derivatives)


def masked_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight.to_dense(), bias)`, with work and memory for the kept weights alone.

    Args:
        x: `[in]` or `[..., in]`, of the dtype of the weight. Under autocast it, the values and the
            bias are cast as those of `F.linear` are.
        weight: a `PackedWeight` of shape `[out, in]`.
        bias: `[out]` or None, of the same dtype.

    Returns:
        `[out]` or `[..., out]`, the dtype of x. Sums are float32 (float64 for float64), in an order
        that does not depend on the number of threads; on the CPU, large batches times a weight that
        keeps much go through the library's dense product of some rows at a time, and the order is
        the library's (`paikern.backends.masked_cost`). Differentiable, any number of times, in x,
        in `weight.values` (the gradient exists at the kept positions only) and in the bias.
        A pruned weight multiplies nothing: NaN or infinity in x reaches the rows that keep a
        weight for it, where a dense product with zeros would spread NaN to all. Not so on a GPU
        where the weight is made dense, as a whole or in tiles, for the length of the call.

    Raises:
        ValueError: shapes that do not fit, a weight of a convolution, tensors on different devices.
        TypeError: another dtype than that of the weight, a weight that is not packed, x or bias
        that is no dense tensor.

    Example:
        >>> import torch, paikern as pk
        >>> w = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
        >>> kept = torch.tensor([[True, False, True], [False, True, False]])
        >>> packed = pk.PackedWeight.from_dense(w, kept)
        >>> masked_linear(torch.ones(3), packed, torch.tensor([0.0, 1.0])).tolist()
        [1.5, 4.0]
    """
    fix = "make one with PackedWeight.from_dense(weight, mask)"
    values = check_given("masked_linear", x, weight, bias, fix)
    kind = "cpu" if values.is_cpu else values.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and values.dtype != torch.float64:
        wanted = torch.get_autocast_dtype(kind)
        x, values = x.to(wanted), values.to(wanted)
        bias = None if bias is None else bias.to(wanted)
    _check(x, values, weight, bias)
    recorded = torch.is_grad_enabled()
    where = weight.where(transposed=recorded and x.requires_grad)
    if _plain(x) and _plain(values) and (bias is None or _plain(bias)) and nothing_intercepts():
        # 15 us less a call than through the dispatcher, and 60 less where a gradient is wanted.
        recorded = recorded and (
            x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
        )
        return _Eager.apply(x, values, bias, where) if recorded else _eager(x, values, bias, where)
    check_dtype("masked_linear", values)
    check_values("masked_linear", values, where)
    y: Tensor = run("masked_linear", x, values, bias, *where, differentiable=True)
    return y


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and type(tensor) in _PLAIN


def _eager(x: Tensor, values: Tensor, bias: Tensor | None, where: tuple[Any, ...]) -> Tensor:
    kernel = registry.resolve("masked_linear", "cpu", values.dtype == torch.float64)
    return kernel(x, values, bias, *where)


class _Eager(torch.autograd.Function):
    """The same derivative as that of the operation, without its way through the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, where: tuple[Any, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.where = where
        return _eager(x, values, bias, where)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, values = ctx.saved_tensors
        return *_derivatives(ctx.needs_input_grad, g, x, values, ctx.where), None


def _check(x: Tensor, values: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    rows, columns = weight.rows, weight.columns
    if len(weight.shape) != 2:
        raise ValueError(
            f"masked_linear: weight must be [out, in], got {tuple(weight.shape)}; use "
            "masked_conv2d, or pack weight.flatten(1)"
        )
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"masked_linear: x must be [..., {columns}] for a weight of shape "
            f"{(rows, columns)}, got {tuple(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(
            f"masked_linear: bias must be [{rows}] for a weight of shape {(rows, columns)}, "
            f"got {tuple(bias.shape)}"
        )
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != values.dtype:
            raise TypeError(
                f"masked_linear: {name} is {tensor.dtype} and the weight {values.dtype}; "
                "convert one of them or use torch.autocast"
            )
        # `is_cpu` first: comparing devices is ten times as slow.
        if not (tensor.is_cpu and values.is_cpu) and tensor.device != values.device:
            raise ValueError(
                f"masked_linear: {name} is on {tensor.device} and the weight on {values.device}; "
                "move them to one device"
            )
