"""A weight under its bits: values, derivatives, and what autograd keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paikern import ops
from paikern.torch_prune.masked import masked

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.int32,
]
SHAPES = [(), (0, 3), (1,), (7,), (3, 5), (4, 3, 2, 2)]


def some_bits(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A mask and its bits."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return mask, ops.pack_mask(mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    mask, bits = some_bits(shape)
    weight = torch.randn(shape).mul(9).to(dtype)
    result = masked(weight, bits)
    assert result.dtype == dtype
    assert torch.equal(result, weight * mask)


def test_nothing_under_the_mask_counts() -> None:
    weight = torch.tensor([math.nan, math.inf, -1.0, 2.0], requires_grad=True)
    bits = ops.pack_mask(torch.tensor([False, False, False, True]))
    result = masked(weight, bits)
    assert result.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert not torch.signbit(result).any()
    result.backward(torch.tensor([math.nan, math.inf, 5.0, 3.0]))
    assert weight.grad.tolist() == [0.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
def test_gradient(expanded: bool) -> None:
    mask, bits = some_bits((5, 3))
    weight = torch.randn(5, 3, requires_grad=True)
    grad = torch.randn(1, 3).expand(5, 3) if expanded else torch.randn(5, 3)
    kept = grad.clone()
    masked(weight, bits).backward(grad)
    assert torch.equal(weight.grad, kept * mask)
    assert torch.equal(grad, kept)  # the caller's gradient is not written to


def test_derivatives() -> None:
    _, bits = some_bits((4, 3))
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: masked(w, bits), weight, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: masked(w, bits).square(), weight)


def test_sparse_gradient() -> None:
    mask, bits = some_bits((3, 2))
    weight = torch.randn(3, 2, requires_grad=True)
    grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 2), (3, 2))
    masked(weight, bits).backward(grad)
    assert weight.grad.is_sparse
    assert torch.equal(weight.grad.to_dense(), grad.to_dense() * mask)


@pytest.mark.parametrize("in_dim", [0, 1, -1])
def test_vmap(in_dim: int) -> None:
    mask, bits = some_bits((4, 3))
    weights = torch.randn(2, 4, 3)
    result = torch.vmap(lambda w: masked(w, bits), in_dims=in_dim)(weights.movedim(0, in_dim))
    assert torch.equal(result, weights * mask)


def test_batched_gradients() -> None:
    mask, bits = some_bits((4, 3))
    weight = torch.randn(4, 3, requires_grad=True)
    grads = torch.randn(5, 4, 3)
    (found,) = torch.autograd.grad(masked(weight, bits), weight, grads, is_grads_batched=True)
    assert torch.equal(found, grads * mask)


def test_autograd_keeps_the_bits_only() -> None:
    _, bits = some_bits((64, 64))
    saved: list[Tensor] = []
    weight = torch.randn(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = masked(weight, bits)
    assert not saved
    assert result.grad_fn.bits is bits
    held = [v for v in vars(result.grad_fn).values() if isinstance(v, Tensor)]
    assert len(held) == 1


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_format_stays(format_: torch.memory_format) -> None:
    mask, bits = some_bits((4, 3, 2, 2))
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=format_)
    result = masked(weight, bits)
    assert result.is_contiguous(memory_format=format_)
    assert torch.equal(result, weight * mask)
