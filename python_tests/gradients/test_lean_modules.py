"""Models that look at their modules, copy them, or differentiate inside, under lean derivatives."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, grad
from torch.nn import functional as F
from torch.nn.utils import parametrize

import paikern as pk
import paikern.gradients.network as networks
from paikern.gradients.lean import LeanFunctions, lean_derivatives
from python_tests.scorers.data_nets import assert_same_state, prepared, state_of

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(6, 3, 6, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.arange(6) % 4
METHODS: dict[str, dict[str, Any]] = {"grasp": {}, "crop": {}, "prospr": {"batches": 1}}


class Net(nn.Module):
    """Convolution, norm, ReLU, classifier."""

    def __init__(self, relu: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.relu, self.head = relu or nn.ReLU(), nn.Linear(64, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))  # type: ignore[no-any-return]


class ByKeyword(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.relu(input=self.norm(input=self.conv(input=x)))  # type: ignore[no-any-return]


class ByType(Net):
    """What it computes depends on what its modules are."""

    def features(self, x: Tensor) -> Tensor:
        for module in (self.conv, self.norm, self.relu):
            x = module(x) * (2 if type(module) in (nn.ReLU, nn.BatchNorm2d) else 1)
        return x


class BySignature(Net):
    """Passes what the module says that it takes."""

    def features(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for module in (self.norm, self.relu):
            (name,) = inspect.signature(module.forward).parameters
            x = module(**{name: x})
        return x


class Copying(Net):
    """The copy computes with its own scale, which is a constant."""

    def features(self, x: Tensor) -> Tensor:
        other = copy.deepcopy(self.norm).requires_grad_(False)
        other.weight.mul_(3)
        return self.relu(other(self.conv(x)) + self.norm(self.conv(x)))  # type: ignore[no-any-return]


class Pickling(Net):
    def features(self, x: Tensor) -> Tensor:
        relu = pickle.loads(pickle.dumps(self.relu))
        return relu(self.norm(self.conv(x)))  # type: ignore[no-any-return]


class Frozen(nn.ReLU):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("__class__", "forward"):
            raise AttributeError(f"{name} is read-only")
        super().__setattr__(name, value)


class Registered(nn.ReLU):
    def __init_subclass__(cls, *, tag: str) -> None:
        raise AssertionError("nobody derives from it")


def of_frozen() -> Net:
    return Net(Frozen())


def of_registered() -> Net:
    return Net(Registered())


def of_parametrized() -> Net:
    net = Net()
    parametrize.register_parametrization(net.norm, "weight", nn.Softplus())
    return net


def shared() -> Net:
    """The norm and the ReLU are held under two names."""
    net = Net()
    net.also = nn.Sequential(net.norm, net.relu)
    return net


MODELS = [
    ByKeyword, ByType, BySignature, Copying, Pickling, of_frozen, of_registered, of_parametrized,
    shared,
]  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_scores_are_those_of_autograd(
    build: Any, method: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    model = prepared(build()).double()
    before, given = state_of(model), [dict(vars(m)) for m in model.modules()]
    found = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(
                networks, "lean_derivatives", lambda *args: contextlib.nullcontext()
            )
        found.append(pk.score(model, method, data=(X, Y), mode=mode, **METHODS[method]))
    for name in found[0]:
        mine, theirs = (scores.dense(name) for scores in found)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12 * float(theirs.abs().max()))
    assert_same_state(model, before)
    assert [vars(m).keys() for m in model.modules()] == [held.keys() for held in given]


class Penalised(Net):
    """The outputs hold the derivative of what comes before them by the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = super().forward(x)
        (slope,) = grad(y.square().sum(), x, create_graph=True)
        return y + slope.square().sum((1, 2, 3))[:, None] * torch.arange(4, dtype=y.dtype)


def composed(x: Tensor, weight: Tensor | None) -> Tensor:
    """Batch norm of operations that autograd differentiates any number of times. Its derivative of
    `F.batch_norm` is not right beyond the second: mean and variance count as constants there."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    centred = x - x.mean(axes, keepdim=True)
    y = centred * (centred.square().mean(axes, keepdim=True) + 1e-5).rsqrt()
    return y if weight is None else y * weight.view(1, -1, 1, 1)


class Composed(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        assert self.training
        return composed(input, self.weight) + self.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_of_derivatives_takes_a_third(method: str) -> None:
    torch.manual_seed(2)
    model = prepared(Penalised()).double()
    by_hand = copy.deepcopy(model)
    by_hand.norm = Composed(4).double()
    by_hand.norm.load_state_dict(model.norm.state_dict())
    before = state_of(model)
    found = [
        pk.score(net, method, data=(X, Y), mode="train", **METHODS[method])
        for net in (model, by_hand)
    ]
    for name in found[0]:
        mine, theirs = (scores.dense(name) for scores in found)
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11 * float(theirs.abs().max()))
    assert_same_state(model, before)


@pytest.mark.parametrize("affine", [True, False])
def test_third_derivatives(affine: bool) -> None:
    shape = (5, 3, 2, 2)
    x, g, v, u = (torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for _ in range(4))
    weight = torch.randn(3, generator=GENERATOR, dtype=torch.float64) if affine else None
    results = []
    for lean in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, g, *([weight] if affine else []))]
        held, along = leaves[:2]
        scale = leaves[2] if affine else None
        with LeanFunctions(None) if lean else contextlib.nullcontext():
            y = F.batch_norm(held, None, None, scale, None, True) if lean else composed(held, scale)
        (first,) = grad(y, held, along, create_graph=True)
        second = grad((first * v).sum(), leaves, create_graph=True)
        results.append(grad((second[0] * u).sum() + second[1].square().sum(), leaves))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_forward_mode_inside_is_left_to_pytorch() -> None:
    norm, relu = nn.BatchNorm2d(3).double().eval(), nn.ReLU()
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X.clone().requires_grad_(), torch.ones_like(X))
        with lean_derivatives(nn.Sequential(norm, relu)):
            found = forward_ad.unpack_dual(relu(norm(x)))
        expected = forward_ad.unpack_dual(relu(norm(x)))
    assert torch.equal(found.primal, expected.primal)
    assert torch.equal(found.tangent, expected.tangent)


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), torch.OutOfMemoryError()])
def test_modules_lose_their_forward_after_any_error(error: BaseException) -> None:
    model = prepared(Net()).double()
    before, calls = state_of(model), []

    def fails(module: nn.Module, args: Any, out: Tensor) -> None:
        calls.append("forward" in vars(module))
        if len(calls) == 2:  # of the pass that is differentiated twice
            raise error

    handle = model.norm.register_forward_hook(fails)
    with pytest.raises(type(error)):
        pk.prune(model, "grasp", sparsity=0.5, data=(X, Y))
    handle.remove()
    assert calls == [False, True]
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same_state(model, before)


def test_modules_that_are_compiled() -> None:
    """Dynamo runs the model's own operations; nothing lean is traced into a graph."""
    torch.manual_seed(2)
    plain = prepared(Net()).double()
    compiled = copy.deepcopy(plain)
    compiled.norm.compile(backend="eager")
    compiled.relu = torch.compile(compiled.relu, backend="eager")
    found = [pk.score(model, "grasp", data=(X, Y)) for model in (plain, compiled)]
    for name in found[0]:
        mine, theirs = (scores.dense(name) for scores in found)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)
