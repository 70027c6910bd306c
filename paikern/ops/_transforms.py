"""Forward-mode derivatives, `torch.func` and `torch.vmap` for operations linear in each argument.

The kernels see plain tensors only. A call that a transform or a dual level watches goes through an
`autograd.Function` with a rule for every transform, made of calls of the same operations, so that
transforms nest in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

# Of `(wanted, g, first, second, rest)`: the derivatives by the factors and the bias, None where
# `wanted` says so. `rest` is everything behind the factors and the bias.
Derivative = Callable[[Sequence[bool], Tensor, Tensor, Any, tuple[Any, ...]], tuple[Any, Any, Any]]


class _Rule(NamedTuple):
    factors: int  # 1 or 2 tensors the operation is linear in
    bias: bool  # whether a bias follows them
    folds: bool  # whether more entries of the first factor are a larger batch
    spread: tuple[int, ...]  # the shape in which a bias is added to the output
    derivative: Derivative


_rules: dict[str, _Rule] = {}


def register(
    name: str,
    derivative: Derivative,
    *,
    factors: int = 2,
    bias: bool = False,
    folds: bool = False,
    spread: tuple[int, ...] = (-1,),
) -> None:
    """Say how an operation is transformed; its tensors come first, then what is not followed."""
    _rules[name] = _Rule(factors, bias, folds, spread, derivative)


def watched() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode derivatives is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _dual_level()


def _dual_level() -> bool:
    return forward_ad._current_level >= 0


def call(name: str, *args: Any) -> Any:
    """`torch.ops.paikern.<name>(*args)` that every transform sees; without rules an error where
    a tangent would be lost."""
    rule = _rules.get(name)
    if rule is None:
        if _dual_level() and any(isinstance(t, Tensor) and _is_dual(t) for t in args):
            raise NotImplementedError(
                f"{name}: has no forward-mode derivative; use reverse mode (torch.autograd.grad)"
            )
        return getattr(torch.ops.paikern, name)(*args)
    first, second = args[0], args[1] if rule.factors == 2 else None
    bias = args[rule.factors] if rule.bias else None
    what = _Call(name, rule, args[rule.factors + rule.bias :])
    if any(t is not None and is_grads_batched(t) for t in (first, second, bias)):
        return _call_batched(first, second, bias, what)
    return _Transformed.apply(first, second, bias, what)


# Whether a tensor is one of many gradients: `torch.autograd.grad(is_grads_batched=True)` and
# `torch.autograd.functional` with `vectorize=True` batch by an older way than `torch.vmap`.
is_grads_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor


def _call_batched(first: Any, second: Any, bias: Any, what: _Call) -> Tensor:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    if level != 1:
        raise NotImplementedError(
            f"{what.name}: batches of batched gradients are not followed; nest torch.func.vmap"
        )
    tensors, dims, size = [], [], 0
    for tensor in (first, second, bias):
        batched = tensor is not None and is_grads_batched(tensor)
        tensors.append(torch._remove_batch_dim(tensor, level, 1, 0) if batched else tensor)
        dims.append(0 if batched else None)
        size = tensors[-1].shape[0] if batched else size
    y, dim = _vmap(size, dims, tensors, what)
    result: Tensor = torch._add_batch_dim(y, dim, level)
    return result


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


@contextmanager
def outside() -> Iterator[None]:
    """For results that outlive a transform, made of tensors that no transform has wrapped."""
    with temporarily_clear_interpreter_stack():
        yield


class _Call:
    """What is not followed. No tree of tensors, so that transforms hand it on as it is."""

    def __init__(self, name: str, rule: _Rule, rest: tuple[Any, ...]) -> None:
        self.name, self.rule, self.rest = name, rule, rest

    def args(self, first: Any, second: Any, bias: Any) -> tuple[Any, ...]:
        factors = (first, second)[: self.rule.factors]
        return (*factors, *((bias,) if self.rule.bias else ()), *self.rest)

    def again(self, first: Any, second: Any, bias: Any = None) -> Any:
        return call(self.name, *self.args(first, second, bias))


class _Transformed(torch.autograd.Function):
    @staticmethod
    def forward(first: Tensor, second: Any, bias: Any, what: _Call) -> Tensor:
        result: Tensor = getattr(torch.ops.paikern, what.name)(*what.args(first, second, bias))
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        first, second, _, what = inputs
        # The derivative of an operation with one factor does not read it.
        saved = (first, second) if what.rule.factors == 2 else (None, None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.what = what
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        (g,) = gradients
        if g is None:
            return None, None, None, None
        what = ctx.what
        wanted = ctx.needs_input_grad
        return *what.rule.derivative(wanted, g, *ctx.saved_tensors, what.rest), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        first_t, second_t, bias_t, _ = tangents
        first, second = ctx.saved_tensors
        what: _Call = ctx.what
        total = None if first_t is None else what.again(first_t, second)
        if second_t is not None:
            more = what.again(first, second_t)
            total = more if total is None else total + more
        if bias_t is not None:
            spread = bias_t.reshape(what.rule.spread)
            if total is None:  # of the output's shape, whatever that is
                total = torch.zeros_like(what.again(first, second))
            total = total + spread
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, what = inputs
        return _vmap(info.batch_size, in_dims[:3], tensors, what)


def _vmap(
    size: int, dims: Sequence[int | None], tensors: Sequence[Any], what: _Call
) -> tuple[Tensor, int]:
    """More of the first factor is a larger batch where that is the same sum; else a loop."""
    if what.rule.folds and dims[0] is not None and dims[1] is None and dims[2] is None:
        first = tensors[0].movedim(dims[0], 0)
        if what.rule.spread == (-1,):  # any number of batch axes
            return what.again(first, *tensors[1:]), 0
        y = what.again(first.flatten(0, 1), *tensors[1:])
        return y.unflatten(0, first.shape[:2]), 0
    each = [
        [t] * size if dim is None else t.unbind(dim) for t, dim in zip(tensors, dims, strict=True)
    ]
    return torch.stack([what.again(*entry) for entry in zip(*each, strict=True)]), 0
