"""Forward-mode derivatives, torch.func, torch.vmap and batched gradients of the masked operations,
against the same of dense operations in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import paikern as pk
from paikern.zoo.gpt2 import Conv1D

KINDS = ["linear", "bitmap", "conv", "grouped", "conv1d", "scatter"]
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case:
    """`sparse` and `dense` are the same function of (x, values, bias)."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        layer: Any
        if kind in ("linear", "bitmap", "scatter"):
            self.kept = torch.rand(7, 9) < 0.4
            format = "bitmap" if kind == "bitmap" else "index"
            packed = pk.PackedWeight.from_dense(
                torch.randn(7, 9).double(), self.kept, format=format
            )
            layer = pk.MaskedLinear(packed, nn.Parameter(torch.randn(7).double()))
            self.x = torch.randn(5, 9).double()
        elif kind == "conv1d":
            dense = Conv1D(7, 9).double()
            nn.init.normal_(dense.weight)
            nn.init.normal_(dense.bias)
            self.kept = torch.rand(dense.weight.shape) < 0.4
            layer = pk.MaskedConv1D.from_conv1d(dense, self.kept)
            self.x = torch.randn(5, 7).double()
        else:
            groups = 2 if kind == "grouped" else 1
            conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=groups).double()
            self.kept = torch.rand(conv.weight.shape) < 0.4
            layer = pk.MaskedConv2d.from_conv(conv, self.kept)
            self.x = torch.randn(2, 4, 5, 6).double()
        self.kind, self.layer = kind, layer
        self.values, self.bias = layer.weight.values.detach().clone(), layer.bias.detach().clone()

    def sparse(self, x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        if self.kind == "scatter":
            dense = self.layer.weight.scatter(values)
            return self.layer.weight.gather(dense * x[0]) + bias.sum()
        parameters = {"weight.values": values, "bias": bias}
        return torch.func.functional_call(self.layer, parameters, (x,))

    def dense(self, x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        # A product with rows of the identity, for which torch has every derivative.
        place = torch.eye(self.kept.numel(), dtype=torch.float64)[self.kept.flatten()]
        weight = (values @ place).view(self.kept.shape)
        if self.kind == "scatter":
            return place @ (weight * x[0]).flatten() + bias.sum()
        if self.kind == "conv1d":
            return x @ weight + bias
        if self.kind in ("conv", "grouped"):
            groups = 2 if self.kind == "grouped" else 1
            return F.conv2d(x, weight, bias, 2, 1, 1, groups)
        return F.linear(x, weight, bias)

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.values, self.bias


def agree(case: Case, transform: Callable[[Function], Any]) -> None:
    torch.testing.assert_close(transform(case.sparse), transform(case.dense))


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("by", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_the_tangent_of_torch_func_jvp(case: Case, by: tuple[int, ...]) -> None:
    tangents = [torch.randn_like(t) if i in by else t * 0 for i, t in enumerate(case.inputs)]
    agree(case, lambda f: jvp(f, case.inputs, tuple(tangents)))


@pytest.mark.parametrize("by", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("recorded", [False, True])
def test_the_tangent_of_a_dual_level(case: Case, by: tuple[int, ...], recorded: bool) -> None:
    tangents = [torch.randn_like(t) for t in case.inputs]

    def tangent(f: Function) -> Tensor:
        with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
            inputs = [t.clone().requires_grad_(recorded) for t in case.inputs]
            duals = [
                forward_ad.make_dual(t, tangents[i]) if i in by else t for i, t in enumerate(inputs)
            ]
            found = forward_ad.unpack_dual(f(*duals)).tangent
            assert found is not None
            return found.detach().clone()

    agree(case, tangent)


def test_gradients_and_jacobians_of_torch_func(case: Case) -> None:
    agree(case, lambda f: grad(lambda *t: f(*t).pow(2).sum(), (0, 1, 2))(*case.inputs))
    agree(case, lambda f: jacrev(f, (0, 1, 2))(*case.inputs))
    agree(case, lambda f: jacfwd(f, (0, 1, 2))(*case.inputs))
    agree(case, lambda f: hessian(lambda v: f(case.x, v, case.bias).pow(3).sum())(case.values))
    agree(
        case, lambda f: jacrev(jacrev(lambda x: f(x, case.values, case.bias).pow(3).sum()))(case.x)
    )


@pytest.mark.parametrize("dims", [(0, None, None), (1, None, None), (None, 0, None), (0, 1, 0)])
def test_vmap_of_the_call_and_of_its_gradient(case: Case, dims: tuple[int | None, ...]) -> None:
    batched = [
        t if d is None else torch.stack([t, -t, 2 * t], d)
        for t, d in zip(case.inputs, dims, strict=True)
    ]
    agree(case, lambda f: vmap(f, dims)(*batched))
    agree(case, lambda f: vmap(grad(lambda *t: f(*t).pow(2).sum(), (0, 1, 2)), dims)(*batched))
    agree(case, lambda f: jvp(vmap(f, dims), tuple(batched), tuple(batched)))


def test_vmap_within_vmap(case: Case) -> None:
    xs = torch.stack([case.x, 2 * case.x])
    values = torch.stack([case.values, -case.values, 3 * case.values])
    agree(
        case,
        lambda f: vmap(vmap(f, (0, None, None)), (None, 0, None))(xs, values, case.bias),
    )


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_batched_gradients(case: Case, strategy: str) -> None:
    jacobian = torch.autograd.functional.jacobian
    agree(case, lambda f: jacobian(f, case.inputs, vectorize=True, strategy=strategy))
    torch.manual_seed(1)
    inputs = [t.clone().requires_grad_() for t in case.inputs]
    g = torch.randn(3, *case.dense(*case.inputs).shape).double()
    agree(case, lambda f: torch.autograd.grad(f(*inputs), inputs, g, is_grads_batched=True))


def test_gradcheck_of_tangents_and_of_batches(case: Case) -> None:
    inputs = tuple(t.clone().requires_grad_() for t in case.inputs)
    assert torch.autograd.gradcheck(
        case.sparse, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )


def test_what_a_transform_makes_does_not_stay_in_the_weight(case: Case) -> None:
    grad(lambda x: case.sparse(x, case.values, case.bias).sum())(case.x)
    x = case.x.clone().requires_grad_()
    (by_x,) = torch.autograd.grad(case.sparse(x, case.values, case.bias).sum(), x)
    (wanted,) = torch.autograd.grad(case.dense(x, case.values, case.bias).sum(), x)
    torch.testing.assert_close(by_x, wanted)


@pytest.mark.parametrize("under", ["func", "dual"])
def test_no_tangent_is_lost_where_there_is_no_forward_mode(under: str) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(3, 4), torch.randn(4)

    def sweep(x: Tensor) -> Tensor:
        return pk.ops.path_forward(w, x, power=2)

    def tangent() -> None:
        if under == "func":
            jvp(sweep, (x,), (x,))
        else:
            with forward_ad.dual_level():
                sweep(forward_ad.make_dual(x, x))

    with pytest.raises(NotImplementedError, match="path_forward: has no forward-mode derivative"):
        tangent()
