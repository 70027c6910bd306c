"""What the path operations share: argument checks, output sizes, the derivative of |w|**p."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from paikern.backends import registry
from paikern.ops import _transforms
from paikern.ops.unpack_mask import check_packed

_PLAIN = (Tensor, torch.nn.Parameter)
_WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def run(name: str, *args: Any, differentiable: bool = False) -> Any:
    """`torch.ops.paikern.<name>(*args)`, outside of autograd unless `differentiable`.

    Plain CPU tensors that no derivative, mode or tracer follows go to the backend directly: the
    dispatcher costs 10 to 18 us a call, as much as the kernel of a small layer.
    """
    if nothing_intercepts() and not (differentiable and _batched(args)):
        following = differentiable and torch.is_grad_enabled()
        float64 = False
        for value in args:
            if not isinstance(value, Tensor):
                continue
            if type(value) not in _PLAIN or not value.is_cpu or (following and value.requires_grad):
                break
            float64 |= value.dtype == torch.float64
        else:
            return registry.resolve(name, "cpu", float64)(*args)
    if (
        differentiable
        and not torch.compiler.is_compiling()
        and (_transforms.watched() or _batched(args))
    ):
        return _transforms.call(name, *args)
    operation = getattr(torch.ops.paikern, name)
    if differentiable:
        return operation(*args)
    with torch.no_grad():
        return operation(*args)


def _batched(args: tuple[Any, ...]) -> bool:
    """Whether a factor, they come first, holds a batch of gradients (60 ns each to look)."""
    batched = _transforms.is_grads_batched
    return batched(args[0]) or (isinstance(args[1], Tensor) and batched(args[1]))


def nothing_intercepts() -> bool:
    """Whether no tracer, transform, mode or forward-mode derivative wants to see a call."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def check_weight(name: str, weight: Tensor, power: int, mask: Tensor | None) -> None:
    if power not in (0, 1, 2):
        raise ValueError(f"{name}: power must be 0, 1 or 2, got {power}")
    if weight.dtype not in _WEIGHTS:
        raise TypeError(f"{name}: weight must be a float tensor, got {weight.dtype}")
    if mask is not None:
        check_packed(name, mask, weight.numel())


def check_float(name: str, argument: str, value: Tensor) -> None:
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: {argument} must be a float tensor, got {value.dtype}")


def check_map(name: str, argument: str, value: Tensor, features: int, weight: Tensor) -> None:
    """A vector or a batch of vectors with `features` entries, for a 2-D weight."""
    if weight.dim() != 2:
        raise ValueError(f"{name}: weight must be [out, in], got shape {tuple(weight.shape)}")
    if value.dim() not in (1, 2) or value.shape[-1] != features:
        raise ValueError(
            f"{name}: {argument} must be [{features}] or [batch, {features}] for a weight of "
            f"shape {tuple(weight.shape)}, got {tuple(value.shape)}"
        )
    check_float(name, argument, value)


def conv_size(
    name: str,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """The output size `[N, O, *out]` of a convolution of an input of `size`, all of it checked."""
    return _cached_conv_shape(
        name,
        tuple(weight.shape),
        tuple(size),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        groups,
    )


def conv_shape(
    name: str,
    weight: tuple[int, ...],
    size: tuple[int, ...],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """`conv_size` of shapes, which may be symbolic."""
    axes = len(weight) - 2
    if axes not in (1, 2, 3):
        raise ValueError(
            f"{name}: weight must be [out, in / groups, *kernel] with 1 to 3 kernel axes, "
            f"got shape {weight}"
        )
    if len(size) != axes + 2 or size[1] != weight[1] * groups:
        raise ValueError(
            f"{name}: a weight of shape {weight} with groups={groups} needs maps "
            f"[batch, {weight[1] * groups}, {axes} spatial axes], got {size}"
        )
    if groups < 1 or weight[0] % groups:
        raise ValueError(
            f"{name}: groups must divide the {weight[0]} rows of the weight, got {groups}"
        )
    for argument, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != axes or any(v < least for v in values):
            raise ValueError(
                f"{name}: {argument} must be {axes} integers >= {least}, got {list(values)}"
            )
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size[2:], weight[2:], stride, padding, dilation, strict=True)
    ]
    if any(n < 1 for n in out):
        raise ValueError(
            f"{name}: the kernel {weight[2:]} with padding {list(padding)} and "
            f"dilation {list(dilation)} is larger than the map {size[2:]}"
        )
    return (size[0], weight[0], *out)


_cached_conv_shape = functools.lru_cache(maxsize=4096)(conv_shape)


def check_conv_map(name: str, argument: str, value: Tensor, size: tuple[int, ...]) -> None:
    if tuple(value.shape) != size:
        raise ValueError(f"{name}: {argument} must have shape {size}, got {tuple(value.shape)}")
    check_float(name, argument, value)


def result_dtype(weight: Tensor, power: int, *maps: Tensor) -> torch.dtype:
    """float64 where a tensor that is read has it, else float32."""
    read = [t.dtype for t in (weight, *maps)][power == 0 :]
    return torch.float64 if torch.float64 in read else torch.float32


def slope(weight: Tensor, power: int, q: Tensor) -> Tensor:
    """`d(|w|**power)/dw * q`, q = M * (g x^T): the gradient of a weight whose product gave q."""
    w = weight.detach().to(q.dtype)
    return ((torch.sign(w) if power == 1 else 2 * w) * q).to(weight.dtype)


def save(ctx: Any, weight: Tensor, source: Tensor, power: int, mask: Tensor | None) -> None:
    """What every derivative needs, kept on an autograd context."""
    ctx.save_for_backward(weight, source, mask)
    ctx.power, ctx.source_dtype = power, source.dtype
