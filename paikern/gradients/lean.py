"""Second derivatives that take little memory, of batch norm and ReLU, in place of autograd's own.

**Batch norm.** For one channel with N values x, mean mu, r = 1 / sqrt(var + eps), xh = r (x - mu):

    y  = w xh + b
    dx = w r (g - mean(g) - xh mean(g xh))        g = dL/dy
    dw = sum g xh,   db = sum g

and for cotangents v, a, c of dx, dw, db, that is of S = sum v dx + a dw + c db,

    dS/dg = w r (v - mean(v) - xh mean(v xh)) + a xh + c
    dS/dx = -w r^2 [q xh + mean(g xh) (v - mean(v) - xh mean(v xh)) + mean(v xh) P] + a r P
    dS/dw = N r q
    P = g - mean(g) - xh mean(g xh),   q = mean(v g) - mean(v) mean(g) - mean(v xh) mean(g xh)

so that dS/dx is, in each channel, alpha v + beta g + gamma (x - mu) + delta. Kept from the passes
are x, g and numbers for each channel, as by autograd; the second derivative makes its two results
and nothing else of their size, where autograd's is composed of steps that each make a map.
In eval mode y is linear in x, and only a number for each channel is kept, unless w is
differentiated.

**ReLU.** dx = g where y > 0. Autograd makes a map of zeros, the derivative of dx by y, and adds it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_norm = torch.ops.aten.native_batch_norm
_norm_backward = torch.ops.aten.native_batch_norm_backward
_threshold_backward = torch.ops.aten.threshold_backward

BLOCK = 1 << 18
"""Values that are worked on at once, so that what is made of them stays in the cache."""
FORWARDS = (nn.modules.batchnorm._BatchNorm.forward, nn.ReLU.forward)


@contextlib.contextmanager
def lean_derivatives(model: nn.Module, by: Iterable[Tensor] | None = None) -> Iterator[None]:
    """Inside, modules that run the `forward` of PyTorch's BatchNorm or ReLU have the derivatives
    above; values, hooks and statistics are as ever.

    It holds for float32 and float64 on CPUs and GPUs, statistics of the batch or fixed ones, with
    weights or without; other tensors, modules with a `forward` of their own (SyncBatchNorm) and
    functions called outside of modules are left to autograd. Modules get a `forward` of their own
    and lose it again; their class stays, which models ask for, and a copy of such a module computes
    with its own tensors. A mode around the whole pass would not reach blocks that are checkpointed,
    which compute their forward pass again within the backward pass.

    Args:
        model: the model to run.
        by: the leaves that derivatives are taken by; None means any.

    Example:
        >>> norm, x = nn.BatchNorm1d(2), torch.tensor([[0.0, 1.0], [2.0, 5.0]], requires_grad=True)
        >>> with lean_derivatives(norm):
        ...     y = norm(x)
        >>> y.grad_fn.name(), y.detach().round(decimals=3).tolist()
        ('_NormBackward', [[-1.0, -1.0], [1.0, 1.0]])
        >>> "forward" in vars(norm)
        False
    """
    leaves = None if by is None else {id(leaf) for leaf in by}
    places = [
        module
        for module in model.modules()
        if type(module).forward in FORWARDS and "forward" not in vars(module)
    ]
    try:
        for module in places:
            # A method, which follows the module when it is copied; into the dictionary, as
            # `__setattr__` may be the module's own.
            vars(module)["forward"] = MethodType(_lean(type(module).forward, leaves), module)
        yield
    finally:
        for module in places:
            vars(module).pop("forward", None)


def _lean(forward: Callable[..., Tensor], leaves: set[int] | None) -> Callable[..., Tensor]:
    """`forward` where `F.batch_norm` and `F.relu` are caught."""

    @functools.wraps(forward)
    def lean(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        with LeanFunctions(leaves):
            return forward(self, *args, **kwargs)

    return lean


class _Call(NamedTuple):
    """The arguments of `F.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class LeanFunctions(TorchFunctionMode):
    """Inside, `F.batch_norm` and `F.relu` have the derivatives above; `leaves` holds ids, or all.

    Values, statistics and refusals are PyTorch's.
    """

    def __init__(self, leaves: set[int] | None) -> None:
        super().__init__()
        self.leaves = leaves

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            call = _Call(*args, **kwargs)
            if _known_norm(call):
                if call.training:
                    return _Norm.apply(*call)
                if not any(self._asked_for(t) for t in (call.weight, call.bias)):
                    return _FixedNorm.apply(*call)
        elif func is F.relu:
            x, in_place = _relu_of(*args, **kwargs)
            if _known(x) and not (in_place and (x.is_leaf or x._is_view())):
                return _Relu.apply(x, in_place)
        return func(*args, **kwargs)

    def _asked_for(self, weight: Tensor | None) -> bool:
        """Whether a derivative by `weight`, or by what it was computed from, may be asked for."""
        if weight is None or not weight.requires_grad:
            return False
        return self.leaves is None or not weight.is_leaf or id(weight) in self.leaves


def _relu_of(input: Tensor, inplace: bool = False) -> tuple[Tensor, bool]:
    """The arguments of `F.relu`."""
    return input, inplace


def _known(*tensors: Tensor) -> bool:
    """Whether these are plain tensors of a plain call that is differentiated."""
    x = tensors[0]
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and x.layout == torch.strided
        and x.device.type in ("cpu", "cuda")
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(forward_ad.unpack_dual(t).tangent is None for t in tensors)
    )


def _known_norm(call: _Call) -> bool:
    """Whether the formulas hold; whatever PyTorch refuses is left to it, for its message."""
    x, *others = call[:5]
    held = [t for t in others if t is not None]
    return (
        _known(x, *held)
        and x.dim() >= 2
        and all((t.shape, t.dtype, t.device) == (x.shape[1:2], x.dtype, x.device) for t in held)
        and (call.running_mean is None) == (call.running_var is None)
        and (x.numel() > x.shape[1] if call.training else call.running_mean is not None)
        and isinstance(call.momentum, (int, float))
        and call.eps > 0
    )


class _Norm(torch.autograd.Function):
    """y of the batch's own statistics; the running ones are updated."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> Tensor:
        x, mean, var, weight, bias, training, momentum, eps = call
        y, mean, rstd = _norm(x, weight, bias, mean, var, training, momentum, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dx, dw, db = _NormBackward.apply(g, *ctx.saved_tensors, ctx.eps)
        by_weight, by_bias = ctx.needs_input_grad[3:5]
        return dx, None, None, dw if by_weight else None, db if by_bias else None, None, None, None


class _NormBackward(torch.autograd.Function):
    """dx, dw, db of `_Norm`."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dx, dw, db = _slopes(g, x, weight, mean, rstd, eps)
        ctx.save_for_backward(g, x, weight, mean, rstd, dw, db)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return dx, dw, db

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, a: Tensor | None, c: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # a third derivative: the loss holds one itself
            return _differentiable(ctx, (v, a, c))
        g, x, weight, mean, rstd, dw, db = ctx.saved_tensors
        n, r = x.numel() // x.shape[1], rstd.double()
        alpha = beta = gamma = delta = torch.zeros_like(r)  # [channels], as all numbers here
        by_g = by_x = by_weight = None
        if v is not None:
            by_g, v_xh, v_sum = _slopes(v, x, weight, mean, rstd, ctx.eps)
            mean_v, mean_vx, mean_g, mean_gx = (t.double() / n for t in (v_sum, v_xh, db, dw))
            q = _inner(v, g) / n - mean_v * mean_g - mean_vx * mean_gx
            k = -r.square() if weight is None else -r.square() * weight
            alpha, beta = k * mean_gx, k * mean_vx
            gamma = k * (q - 2 * mean_vx * mean_gx)
            delta = -k * (mean_gx * mean_v + mean_vx * mean_g)
            by_weight = None if weight is None else (n * r * q).to(weight.dtype)
        if a is not None:
            beta = beta + a * r
            gamma, delta = gamma - a * r * dw / n, delta - a * r * db / n
        if ctx.needs_input_grad[1]:
            by_x = _sum_of(x, mean, gamma * r, delta, (v, alpha), (g, beta))
        if a is not None or c is not None:
            slope, offset = (torch.zeros_like(r) if t is None else t.double() for t in (a, c))
            by_g = _sum_of(x, mean, slope * r, offset, (by_g, torch.ones_like(r)))
        return by_g, by_x, by_weight, None, None, None


def _differentiable(ctx: Any, along: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """dS/dg, dS/dx and dS/dw of operations that autograd differentiates as often as it is asked."""
    g, x, weight = given = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:3]]
    assert g is not None
    assert x is not None
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    centred = x - x.mean(axes, keepdim=True)
    rstd = (centred.square().mean(axes, keepdim=True) + ctx.eps).rsqrt()
    xh = centred * rstd
    rest = g - g.mean(axes, keepdim=True) - xh * (g * xh).mean(axes, keepdim=True)
    dx = rstd * rest if weight is None else weight.view(shape) * rstd * rest
    slopes = (dx, (g * xh).sum(axes), g.sum(axes))
    asked = [(slope, v) for slope, v in zip(slopes, along, strict=True) if v is not None]
    by = [t for t in given if t is not None and t.requires_grad]
    made = iter(
        torch.autograd.grad(
            [slope for slope, _ in asked], by, [v for _, v in asked],
            create_graph=True, allow_unused=True,
        )
    )  # fmt: skip
    found = [next(made) if t is not None and t.requires_grad else None for t in given]
    return (*found, None, None, None)


class _FixedNorm(torch.autograd.Function):
    """y of fixed statistics, whose derivative by x is a number for each channel."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> Tensor:
        x, mean, var, weight, bias, training, momentum, eps = call
        scale = (var + eps).rsqrt_()
        ctx.save_for_backward(scale if weight is None else scale.mul_(weight))
        return _norm(x, weight, bias, mean, var, training, momentum, eps)[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return g * _spread(scale, g), *[None] * 7


class _Relu(torch.autograd.Function):
    """The derivative is taken of a y that is a constant, so that none is made of zeros for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
        y = x.relu_() if in_place else x.relu()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _threshold_backward(g, ctx.saved_tensors[0].detach(), 0), None


def _slopes(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """w r P, sum g xh and sum g."""
    made: tuple[Tensor, Tensor, Tensor] = _norm_backward(
        g, x, weight, None, None, mean, rstd, True, eps, [True, True, True]
    )
    return made


def _inner(v: Tensor, g: Tensor) -> Tensor:
    """`(v * g).sum` over all but the channels, float64."""
    axes = [axis for axis in range(v.dim()) if axis != 1]
    total = v.new_zeros(v.shape[1], dtype=torch.float64)
    for rows in _blocks(v):
        total += (v[rows] * g[rows]).sum(axes)
    return total


def _sum_of(
    x: Tensor, mean: Tensor, gamma: Tensor, delta: Tensor, *terms: tuple[Tensor | None, Tensor]
) -> Tensor:
    """`gamma * (x - mean) + delta` and the product of each of `terms`; a tensor of None is 0."""
    made = torch.empty_like(x)
    middle, slope, offset = (_spread(t, x) for t in (mean, gamma, delta))
    factors = [(t, _spread(factor, x)) for t, factor in terms if t is not None]
    for rows in _blocks(x):
        block = torch.sub(x[rows], middle, out=made[rows]).mul_(slope).add_(offset)
        for t, factor in factors:
            block.addcmul_(t[rows], factor)
    return made


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of samples, of `BLOCK` values or one sample; on a GPU 64 times as many."""
    block = BLOCK * (64 if x.is_cuda else 1)
    step = max(1, block // x[0].numel())
    for start in range(0, len(x), step):
        yield slice(start, start + step)


def _spread(numbers: Tensor, x: Tensor) -> Tensor:
    """`[channels]` as `[1, channels, 1...]` in the dtype of x."""
    return numbers.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))
