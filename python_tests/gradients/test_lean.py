"""Batch norm and ReLU differentiated twice: derivatives, values, memory, what is left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from paikern.batches import Batch
from paikern.gradients import network as networks
from paikern.gradients.lean import LeanFunctions, lean_derivatives
from python_tests.gradients.test_network import network, run_of

SHAPES = [(5, 3), (4, 3, 6), (3, 2, 3, 4), (2, 2, 2, 3, 2)]


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made_by(tensor: Tensor) -> str:
    assert tensor.grad_fn is not None
    return tensor.grad_fn.name()


# Derivatives


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_statistics(shape: tuple[int, ...], affine: bool) -> None:
    def norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        with LeanFunctions(None):
            y = F.batch_norm(x, None, None, weight, bias, True)
        assert made_by(y) == "_NormBackward"
        return y

    inputs = [2 * numbers(*shape) + 3]
    if affine:
        inputs += [numbers(shape[1], seed=1), numbers(shape[1], seed=2)]
    inputs = [t.requires_grad_() for t in inputs]
    assert gradcheck(norm, inputs)
    assert gradgradcheck(norm, inputs)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fixed_statistics(shape: tuple[int, ...], affine: bool) -> None:
    x, mean, var = numbers(*shape).requires_grad_(), numbers(shape[1]), numbers(shape[1]).exp()
    weight = nn.Parameter(numbers(shape[1], seed=1)) if affine else None

    def norm(x: Tensor) -> Tensor:
        with LeanFunctions({id(x)}):
            y = F.batch_norm(x, mean, var, weight, None, False)
        assert made_by(y) == "_FixedNormBackward"
        return y

    assert gradcheck(norm, [x])
    assert gradgradcheck(norm, [x])


@pytest.mark.parametrize("in_place", [False, True])
def test_relu(in_place: bool) -> None:
    def squared(x: Tensor) -> Tensor:
        with LeanFunctions(None):
            before = x * 1
            y = F.relu(before, in_place)
        assert made_by(y) == "_ReluBackward"
        assert (y is before) == in_place
        return y * y

    x = numbers(4, 5).requires_grad_()
    assert gradcheck(squared, [x])
    assert gradgradcheck(squared, [x])
    zeros = torch.zeros(2, requires_grad=True)
    with LeanFunctions(None):
        y = F.relu(zeros * 1, in_place)
    assert torch.equal(grad(y.sum(), zeros)[0], zeros)  # as PyTorch has it


Cotangents = tuple[Tensor | None, Tensor | None, Tensor | None]


def second(x: Tensor, weight: Tensor, g: Tensor, along: Cotangents, lean: bool) -> list[Tensor]:
    """The derivatives of `<along, (dx, dw, db)>` by g, x and weight."""
    g, x, weight = leaves = [t.detach().requires_grad_() for t in (g, x, weight)]
    bias = torch.zeros_like(weight).requires_grad_()
    with LeanFunctions(None) if lean else contextlib.nullcontext():
        y = F.batch_norm(x, None, None, weight, bias, True)
    slopes = grad(y, (x, weight, bias), g, create_graph=True)
    z = sum((v * s).sum() for v, s in zip(along, slopes, strict=True) if v is not None)
    assert isinstance(z, Tensor)
    return list(grad(z, leaves, allow_unused=True, materialize_grads=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=5),
    st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]),
    st.integers(0, 1000),
)
def test_any_shape_equals_autograd(
    shape: list[int], asked: tuple[int, int, int], seed: int
) -> None:
    shape[0] += 2
    x, g, v = (numbers(*shape, seed=seed + i) for i in range(3))
    weight, a, c = (numbers(shape[1], seed=seed + i) for i in range(3, 6))
    along = (v if asked[0] else None, a if asked[1] else None, c if asked[2] else None)
    mine, theirs = (second(x, weight, g, along, lean) for lean in (True, False))
    for found, expected in zip(mine, theirs, strict=True):
        # Of few values with little spread r is large, and enters in its third power.
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", ["channels_last", "expanded", "strided"])
def test_cotangents_of_any_layout(kind: str) -> None:
    x, weight, g, v = (
        numbers(4, 3, 5, 5),
        numbers(3),
        numbers(4, 3, 5, 5, seed=1),
        numbers(4, 3, 5, 5),
    )
    if kind == "channels_last":
        x, v = (t.contiguous(memory_format=torch.channels_last) for t in (x, v))
    elif kind == "expanded":
        v = numbers(1, 3, 1, 5).expand(4, 3, 5, 5)
    else:
        v, g = numbers(4, 3, 5, 10)[..., ::2], g.transpose(2, 3)
    mine, theirs = (second(x, weight, g, (v, None, None), lean) for lean in (True, False))
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_many_blocks_in_float32_lose_no_more_than_autograd() -> None:
    """A mean of 30 deviations, and more values than a block holds."""
    x, g, v = (numbers(48, 5, 50, 50, seed=i) for i in range(3))
    x, weight = x + 30, 1 + numbers(5).square()
    expected = second(x, weight, g, (v, None, None), False)
    x, weight, g, v = (t.float() for t in (x, weight, g, v))
    mine, theirs = (second(x, weight, g, (v, None, None), lean) for lean in (True, False))
    for found, other, truth in zip(mine, theirs, expected, strict=True):
        size = float(truth.abs().max())
        error, bound = (float((t - truth).abs().max()) / size for t in (found, other))
        assert error <= bound + 1e-6


# Values, statistics, hooks


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    ids=["default", "cumulative", "plain", "no statistics"],
)
def test_values_and_statistics_are_those_of_pytorch(options: dict[str, Any], mode: str) -> None:
    x = numbers(6, 3, 4, 4, dtype=torch.float32).requires_grad_()
    results, states = [], []
    for lean in (True, False):
        norm = nn.BatchNorm2d(3, **options).train(mode == "train")
        seen: list[str] = []
        norm.register_forward_pre_hook(lambda *_, seen=seen: seen.append("before"))
        norm.register_forward_hook(lambda *_, seen=seen: seen.append("after"))
        norm.register_full_backward_hook(lambda *_, seen=seen: seen.append("backward"))
        with lean_derivatives(norm, [x]) if lean else contextlib.nullcontext():
            y = norm(norm(x))
        (slope,) = grad(y.square().sum(), x)
        assert seen == ["before", "after"] * 2 + ["backward"] * 2
        results.append((y.detach(), slope))
        states.append(norm.state_dict())
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key])


# What is left to autograd


class Wrapped(Tensor):
    """Calls of functions on it are as ever."""


def norm_of(x: Tensor, **options: Any) -> Callable[[], Tensor]:
    given = {"running_mean": None, "running_var": None, "training": True, **options}
    return lambda: F.batch_norm(x, **given)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return numbers(*shape).to(dtype).requires_grad_()


FIXED = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "training": False}
LEFT: dict[str, Callable[[], Tensor]] = {
    "bfloat16": norm_of(leaf(4, 3, dtype=torch.bfloat16)),
    "mixed": norm_of(leaf(4, 3, dtype=torch.bfloat16), weight=leaf(3)),
    "fixed, by weight": norm_of(leaf(4, 3), weight=leaf(3), **FIXED),
    "fixed, by bias": norm_of(leaf(4, 3), weight=torch.ones(3), bias=leaf(3), **FIXED),
    "fixed, by a product": norm_of(leaf(4, 3), weight=leaf(3) * 2, **FIXED),
    "subclass": norm_of(leaf(4, 3).as_subclass(Wrapped)),
    "relu, bfloat16": lambda: F.relu(leaf(4, dtype=torch.bfloat16)),
    "relu, of a view": lambda: F.relu((leaf(4, 3) * 1)[1:], inplace=True),
    "relu6": lambda: F.relu6(leaf(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_autograd(name: str) -> None:
    with LeanFunctions(None):
        y = LEFT[name]()
    assert made_by(y) not in ("_NormBackward", "_FixedNormBackward", "_ReluBackward")
    torch.testing.assert_close(y, LEFT[name](), rtol=0, atol=0)


def test_transforms_inside_the_model() -> None:
    x = leaf(5, 4, 3)
    with LeanFunctions(None):
        rows = torch.vmap(lambda t: F.batch_norm(t, None, None, training=True).relu())(x)
        slopes = torch.func.grad(lambda t: F.batch_norm(t, None, None, training=True).relu().sum())(
            x.detach()
        )
    for row, part in zip(rows, x, strict=True):
        torch.testing.assert_close(row, F.batch_norm(part, None, None, training=True).relu())
    assert slopes.shape == x.shape


def test_refusals_are_those_of_pytorch() -> None:
    with LeanFunctions(None):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            nn.BatchNorm1d(3)(leaf(1, 3))
        with pytest.raises(RuntimeError, match="running_mean should contain 4 elements not 3"):
            nn.BatchNorm1d(3)(leaf(2, 4))
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            F.relu(leaf(3), inplace=True)
        with pytest.raises(ValueError, match="eps must be positive"):
            F.batch_norm(leaf(2, 3), None, None, training=True, eps=0.0)


class Own(nn.ReLU):
    """A `forward` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0.5)


class Same(nn.BatchNorm1d):
    """Another name."""


def test_which_modules_are_lean_and_that_all_are_put_back() -> None:
    patched = nn.ReLU()
    patched.forward = lambda x: x + 1  # type: ignore[method-assign]
    kinds = [nn.BatchNorm1d(3), nn.ReLU(), Same(3), Own(), nn.SyncBatchNorm(3), patched]
    model = nn.Sequential(*kinds, nn.ReLU6(), nn.InstanceNorm1d(3))
    before = [type(module) for module in model]
    with contextlib.suppress(KeyError), lean_derivatives(model):
        for module, kind in zip(model, before, strict=True):
            assert type(module) is kind
            assert ("forward" in vars(module)) == (module in [*kinds[:3], patched])
            assert repr(module).startswith(kind.__name__)
        x = leaf(4, 3)
        assert made_by(model[0](x)) == "_NormBackward"
        assert made_by(model[2](x)) == "_NormBackward"
        assert torch.equal(model[3](x), x.clamp(min=0.5))
        assert torch.equal(patched(x), x + 1)
        raise KeyError
    assert [type(module) for module in model] == before
    assert [module for module in model if "forward" in vars(module)] == [patched]


# Memory


class Live(TorchDispatchMode):
    """Which operations run, and the most bytes that what they have made takes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.names: set[str] = set()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        given = {s._cdata for s in storages((args, kwargs))}
        for storage in storages(made):
            if storage._cdata not in given:
                self.held.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.held = {key: value for key, value in self.held.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return made


def storages(tensors: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, Tensor)]


def test_the_second_derivative_of_a_norm_makes_two_maps() -> None:
    x, weight = leaf(8, 2, 64, 512), leaf(2)  # a sample has 64 Ki values, a block four of them
    peaks = {}
    for lean in (True, False):
        with LeanFunctions(None) if lean else contextlib.nullcontext():
            y = F.batch_norm(x, None, None, weight, None, True)
            g = torch.ones_like(y).requires_grad_()
            (slope,) = grad(y, x, g, create_graph=True)
            v = torch.ones_like(x)
            with Live() as live:
                found = grad(slope, (g, x), v)
        assert found[0].shape == found[1].shape == x.shape
        peaks[lean] = live.peak / (4 * x.numel())
    assert 2 <= peaks[True] <= 2.6
    assert peaks[False] > 5


def test_fixed_norms_keep_nothing_of_the_maps() -> None:
    x, weight = leaf(4, 3, 8, 8), nn.Parameter(torch.ones(3))
    kept: list[int] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.numel()) or t, lambda t: t
        ),
        LeanFunctions({id(x)}),
    ):
        y = F.batch_norm(x, torch.zeros(3), torch.ones(3), weight, weight, False)
        grad(y.sum(), x, create_graph=True)
    assert kept
    assert max(kept) == 3


class Residual(nn.Module):
    """Norms of every number of dimensions, ReLUs in place and not, a sum, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.plain = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.deep, self.free = nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, track_running_stats=False)
        self.head, self.flat, self.last = nn.Linear(32, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.relu, self.again = nn.ReLU(inplace=True), False

    def block(self, x: Tensor) -> Tensor:
        return self.relu(self.plain(self.body(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.relu(self.norm(self.stem(x))), 2)
        y = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        x = torch.relu(self.free(self.deep((x + y)[:, None])))
        x = F.adaptive_avg_pool3d(x, (4, 2, 2)).flatten(1)
        z: Tensor = self.last(self.flat(self.head(x)).relu())
        return z


def residual() -> tuple[Residual, list[Batch]]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = Residual()
        nn.init.uniform_(model.norm.weight, 0.5, 1.5)
        data = [Batch(torch.randn(6, 3, 12, 12), torch.arange(6) % 4) for _ in range(2)]
    return model, data


def nothing(model: nn.Module, by: Any = None) -> Any:
    return contextlib.nullcontext()


@pytest.mark.parametrize("again", [False, True], ids=["held", "checkpointed"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_products_equal_autograd(mode: str, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = residual()
    data = [Batch(b.inputs.double(), b.targets) for b in data]
    model.double().again = again
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(networks, "lean_derivatives", nothing)
        with network(run_of(model), mode).running() as net, Live() as live:
            slopes = net.gradients(data)
            found.append(net.hessian_product(slopes, data))
        assert ({"train": "addcmul_", "eval": "rsqrt_"}[mode] in live.names) == lean
    assert all(bool((h != 0).any()) for h in found[0].values())
    for name, product in found[1].items():
        torch.testing.assert_close(found[0][name], product, rtol=1e-9, atol=1e-12)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert int(before["norm.num_batches_tracked"]) == 0


@pytest.mark.parametrize(("mode", "bound"), [("train", 0.8), ("eval", 0.7)])
def test_products_take_less_memory(
    mode: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    data = [Batch(numbers(8, 3, 32, 32, dtype=torch.float32), torch.arange(8) % 4)]
    peaks = []
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(networks, "lean_derivatives", nothing)
        with network(run_of(model), mode).running() as net:
            slopes = net.gradients(data)
            with Live() as live:
                net.hessian_product(slopes, data)
        peaks.append(live.peak)
        assert "select_backward" not in live.names  # would make one more set of the weights
    assert peaks[0] <= bound * peaks[1], peaks
