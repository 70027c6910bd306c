"""What ATen operations return, as meta tensors, without the meta kernels that are slow.

Many meta kernels are reference implementations in Python: 0.4 ms for a `relu`, 2 ms for an
attention, and the first one imports PyTorch's compiler, 0.9 s. Of the operations that networks are
made of, the usual case (one floating dtype, shapes that fit) is written out here; any other case,
mistakes included, is left to the meta kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Shape = Callable[..., "Tensor | None"]
_KNOWN: dict[str, Shape] = {}


def of(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """The result of `func` on meta tensors; `name` is its ATen name without the overload."""
    known = _KNOWN.get(name)
    if known is not None and (known is _embedding or _one_dtype(args, kwargs)):
        result = known(*args, **kwargs)
        if result is not None:
            return result
    return func(*args, **kwargs)


def _one_dtype(args: Any, kwargs: Any) -> bool:
    """One floating dtype everywhere, no `out`, no other dtype asked for."""
    if any(isinstance(x, Tensor) or name in ("dtype", "out") for name, x in kwargs.items()):
        return False
    found = set()
    for x in args:
        if isinstance(x, Tensor):
            found.add(x.dtype)
        elif isinstance(x, list):
            found.update(t.dtype for t in x if isinstance(t, Tensor))
        elif isinstance(x, torch.dtype):
            return False
    return len(found) == 1 and found.pop().is_floating_point


def _knows(names: str) -> Callable[[Shape], Shape]:
    def register(shape: Shape) -> Shape:
        for name in names.split():
            _KNOWN["aten." + name] = shape
        return shape

    return register


def _new(x: Tensor, shape: Any) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device="meta")


def _like(x: Tensor) -> Tensor | None:
    """Shape and order of dimensions of `x`, without gaps. (`empty_like` is slow on meta.)"""
    if x.is_contiguous():
        return _new(x, x.shape)
    order = sorted(range(x.dim()), key=lambda d: (x.shape[d] > 1, x.stride(d)))
    wide = [x.stride(d) for d in order if x.shape[d] > 1]
    if len(set(wide)) < len(wide) or 0 in wide:
        return None
    strides, size = [1] * x.dim(), 1
    for d in order:
        strides[d] = size
        size *= x.shape[d]
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device="meta")


# Element by element the result has the layout of the first tensor that has its shape.
@_knows("relu relu6 gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu elu mish "
        "softplus neg abs exp square sqrt rsqrt")  # fmt: skip
def _unary(x: Tensor, *options: Any, **named: Any) -> Tensor | None:
    return None if any(isinstance(o, Tensor) for o in options) else _like(x)


@_knows("dropout feature_dropout alpha_dropout")
def _dropout(x: Tensor, p: float, train: bool) -> Tensor | None:
    """A tensor of its own: the kernel returns `x`, and a write to it would change `x`."""
    return None if train else _like(x)


@_knows("relu_ relu6_ silu_ hardswish_ hardsigmoid_ hardtanh_ leaky_relu_ elu_")
def _unary_in_place(x: Tensor, *options: Any, **named: Any) -> Tensor:
    return x


@_knows("add sub mul div")
def _binary(x: Any, y: Any, *options: Any, **named: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or options:
        return None
    if isinstance(y, (int, float)):
        return _like(x)
    if not isinstance(y, Tensor):
        return None
    if _broadcasts(y.shape, x.shape):
        return _like(x)
    if _broadcasts(x.shape, y.shape) and x.is_contiguous() and y.is_contiguous():
        return _like(y)
    return None


@_knows("add_ sub_ mul_ div_")
def _binary_in_place(x: Tensor, y: Any, *options: Any, **named: Any) -> Tensor | None:
    fits = not isinstance(y, Tensor) or _broadcasts(y.shape, x.shape)
    return x if fits and not options else None


def _broadcasts(small: Any, large: Any) -> bool:
    """Whether `small` can be expanded to `large`. (`torch.broadcast_shapes` imports sympy.)"""
    if len(small) > len(large):
        return False
    tail = large[len(large) - len(small) :]
    return all(a in (1, b) for a, b in zip(small, tail, strict=True))


@_knows("linear")
def _linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]:
        return None
    return _new(x, (*x.shape[:-1], w.shape[0])) if _fits(bias, w.shape[:1]) else None


@_knows("scaled_dot_product_attention")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    **named: Any,
) -> Tensor | None:
    """`[B, H, T, E]`, laid out `[B, T, H, E]` as the fused kernel of the CPU does."""
    heads = k.shape[:2] == q.shape[:2] or bool(named.get("enable_gqa"))
    if q.dim() != 4 or k.shape != v.shape or q.shape[-1] != k.shape[-1] or not heads:
        return None
    if k.shape[0] != q.shape[0] or not k.shape[1] or q.shape[1] % k.shape[1]:
        return None
    if mask is not None and (causal or not _broadcasts(mask.shape, (*q.shape[:3], k.shape[2]))):
        return None
    batch, heads_, tokens, width = q.shape
    return _new(q, (batch, tokens, heads_, width)).transpose(1, 2)


def _fits(vector: Any, shape: Any) -> bool:
    return vector is None or (isinstance(vector, Tensor) and vector.shape == torch.Size(shape))


def _conv(n: int) -> Shape:
    def shape(
        x: Tensor,
        w: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        if isinstance(padding, str) or x.dim() != n + 2 or w.dim() != n + 2:
            return None
        if not (x.is_contiguous() and w.is_contiguous()):
            return None
        out, per_group = w.shape[0], w.shape[1]
        if groups < 1 or x.shape[1] != per_group * groups or out % groups or not x.shape[0]:
            return None
        if not _fits(bias, (out,)) or not x.shape[1] or not out:
            return None
        size = _windows(x, w.shape[2:], stride, padding, dilation)
        return None if size is None else _new(x, (x.shape[0], out, *size))

    return shape


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int] | None:
    """How many windows fit in each dimension of `[N, C, ...]`; None where none does."""
    n = x.dim() - 2
    size = [
        (length + 2 * p - d * (k - 1) - 1) // s + 1 if min(k, s, d) > 0 and p >= 0 else 0
        for length, k, s, p, d in zip(
            x.shape[2:], kernel, _each(stride, n), _each(padding, n), _each(dilation, n),
            strict=True,
        )
    ]  # fmt: skip
    return size if min(size) > 0 else None


def _each(value: Any, n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value) * (n if len(value) == 1 else 1)


_KNOWN.update({f"aten.conv{n}d": _conv(n) for n in (1, 2, 3)})


def _max_pool(n: int) -> Shape:
    def shape(
        x: Tensor,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Tensor | None:
        if x.dim() != n + 2 or not x.numel() or not x.is_contiguous() or ceil_mode:
            return None
        kernel, padding = _each(kernel, n), _each(padding, n)
        if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            return None
        size = _windows(x, kernel, stride or kernel, padding, dilation)
        return None if size is None else _new(x, (*x.shape[:2], *size))

    return shape


_KNOWN.update({f"aten.max_pool{n}d": _max_pool(n) for n in (1, 2, 3)})


@_knows("batch_norm")
def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Any:
    vectors = (weight, bias, mean, var)
    fit = x.dim() >= 2 and x.numel() and all(_fits(v, x.shape[1:2]) for v in vectors)
    fit = fit and x.is_contiguous()
    return _new(x, x.shape) if fit and not (rest and rest[0]) else None


@_knows("layer_norm rms_norm")
def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, *rest: Any) -> Any:
    shape = tuple(shape)
    bias = bias if isinstance(bias, Tensor) else None  # the third of rms_norm is a number
    fit = shape and tuple(x.shape[-len(shape) :]) == shape and _fits(weight, shape)
    return _new(x, x.shape) if fit and _fits(bias, shape) and x.numel() else None


@_knows("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
def _adaptive(x: Tensor, size: Any) -> Tensor | None:
    fit = x.dim() == len(size) + 2 and min(size) > 0 and x.numel() and x.is_contiguous()
    return _new(x, (*x.shape[:2], *size)) if fit else None


@_knows("embedding")
def _embedding(w: Tensor, ids: Tensor, *options: Any) -> Tensor | None:
    whole = ids.dtype in (torch.int64, torch.int32)
    return _new(w, (*ids.shape, w.shape[1])) if whole and w.dim() == 2 else None


@_knows("cat")
def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if first.dim() > 3 and not any(
        t.is_contiguous() or t.stride(1) > t.stride(-1) for t in tensors
    ):
        return None  # they may agree on channels last
    if not first.dim() or not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    around = [(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors]
    if any(t.dim() != first.dim() for t in tensors) or len(set(around)) > 1:
        return None
    width = sum(t.shape[dim] for t in tensors)
    return _new(first, (*first.shape[:dim], width, *first.shape[dim + 1 :]))


__all__ = ["of"]
