"""The two sweeps: conservation, every path one by one, exponents, rescaling, refusals."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from paikern.errors import NonFiniteScoreError
from paikern.pathgraph import Flow, Semantics, Visit, trace, weights
from paikern.pathgraph.flow import device_of
from python_tests.oracles.brute_force import brute_force
from python_tests.pathgraph.helpers import scores_of, state_of


def mlp(layers: list[list[list[int]]]) -> nn.Module:
    """A bias-free MLP with the given integer weights."""
    model = nn.Sequential(*(nn.Linear(len(rows[0]), len(rows), bias=False) for rows in layers))
    with torch.no_grad():
        for layer, rows in zip(model, layers, strict=True):
            layer.weight.copy_(torch.tensor(rows))
    return model


@st.composite
def integer_layers(draw: st.DrawFn) -> list[list[list[int]]]:
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    return [
        [[draw(st.integers(-3, 3)) for _ in range(i)] for _ in range(o)]
        for i, o in itertools.pairwise(widths)
    ]


@given(integer_layers(), st.sampled_from([0, 1, 2]))
@settings(max_examples=60, deadline=None)
def test_every_path_one_by_one(layers: list[list[list[int]]], power: int) -> None:
    """Score = sum over the paths through a weight of the product of |w|**power."""
    magnitudes = [[[abs(w) ** power for w in row] for row in rows] for rows in layers]
    expected = brute_force(magnitudes)
    model = mlp(layers)
    log_total, found = scores_of(model, torch.ones(1, len(layers[0][0])), power=power)
    if expected.total == 0:
        assert log_total == -math.inf
        return
    assert log_total == pytest.approx(math.log(expected.total), abs=1e-12)
    for index, through in enumerate(expected.through):
        shares = [[float(p / expected.total) for p in row] for row in through]
        expected_score = torch.tensor(shares, dtype=torch.float64)
        torch.testing.assert_close(found[f"{index}.weight"], expected_score, rtol=1e-12, atol=0)


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Bias-free chains of convolutions, pools and linear layers, with their input."""
    generator_seed = draw(st.integers(0, 2**31))
    torch.manual_seed(generator_seed)
    channels, size = draw(st.integers(1, 3)), draw(st.integers(6, 9))
    x = torch.ones(1, channels, size, size)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([2, 4, 6]))
        groups = 2 if channels % 2 == 0 and draw(st.booleans()) else 1
        kernel, stride = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
        layers += [
            nn.Conv2d(
                channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False
            ),
            draw(st.sampled_from([nn.ReLU(), nn.BatchNorm2d(out), nn.Dropout()])),
        ]
        channels = out
    layers.append(draw(st.sampled_from([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1)])))
    layers += [nn.Flatten(), nn.Linear(channels, 3, bias=False)]
    return nn.Sequential(*layers), x


@given(chains(), st.sampled_from([0, 1, 2]), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=40, deadline=None)
def test_every_layer_of_a_chain_carries_the_whole_flow(
    chain: tuple[nn.Module, Tensor], power: int, dtype: torch.dtype
) -> None:
    """Scores of a layer that is a cut of the graph sum to R; for power 0, sum M q = 1."""
    model, x = chain
    masks = pk.prune(model, "random", sparsity=0.2, scope="local", apply=False)
    packed = {name: masks.packed(name) for name in masks}
    log_total, found = scores_of(model, x, power=power, masks=packed, dtype=dtype)
    if log_total == -math.inf:
        return
    for score in found.values():
        assert float(score.sum()) == pytest.approx(1, rel=1e-5)
        assert float(score.min()) >= 0


class Residual(nn.Module):
    """Branches of very different size meet at every add: one multiplies by 1e20 or 1e-20."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(8))
        self.head = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                block.weight.mul_(scale if i % 2 else 1 / scale)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).relu()
        y: Tensor = self.head(x.mean((2, 3)))
        return y


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e20, 1e-20])
def test_exponents_meet_at_residual_adds(scale: float) -> None:
    """Totals up to e370, in float32; compared with float64, which holds no exponent that far."""
    model, x = Residual(scale), torch.ones(1, 3, 5, 5)
    log_total, found = scores_of(model, x, dtype=torch.float32)
    expected_log, expected = scores_of(model, x)
    assert log_total == pytest.approx(expected_log, abs=1e-5)
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-30)


def test_counts_that_would_underflow_stay_positive() -> None:
    """A branch that is 2**-400 of the other one still lies on a path."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.thin = nn.Linear(4, 16)
            self.wide = nn.ModuleList(nn.Linear(4 if i == 0 else 16, 16) for i in range(100))
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for layer in self.wide:
                y = layer(y)
            z: Tensor = self.head(y + self.thin(x))
            return z

    top = pk.analyze(Net(), example_inputs=torch.ones(1, 4))
    assert top.effective_params == top.numel
    assert top.log_paths > 270
    assert not top.dead_channels


@pytest.mark.parametrize("name", ["lenet300", "vgg16_bn"])
def test_published_objective_is_log_paths_on_chains(name: str) -> None:
    model = zoo.create(name)
    x = zoo.example_input(model)
    masks = pk.prune(model, "random", sparsity=0.95, scope="erk", apply=False)
    packed = {n: masks.packed(n) for n in masks}
    graph, state = trace(model, x), state_of(model)
    published = Flow(graph, Semantics(0), rescale="input_max").forward(state, packed)
    counted = Flow(graph, Semantics(0)).forward(state, packed)
    assert published == pytest.approx(counted, rel=1e-6)


def test_published_objective_gradient_against_autograd() -> None:
    """The division by the maximum takes part in the derivative (shared by all maxima)."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.Conv2d(3, 2, 3, bias=False),
        nn.Flatten(),
        nn.Linear(18, 4, bias=False),
    )
    x, state = torch.ones(1, 1, 5, 5), state_of(model)
    flow = Flow(trace(model, x), Semantics(0), dtype=torch.float64, rescale="input_max")
    objective = flow.forward(state)
    found: dict[str, Tensor] = {}

    def visit(v: Visit) -> None:
        found[v.step.parameter] = weights.score(v.step, v.x, v.g, state, {}, 0)

    flow.backward(visit)
    values = {n: torch.ones_like(t, dtype=torch.float64).requires_grad_() for n, t in state.items()}
    h, total = x.double(), torch.zeros((), dtype=torch.float64)
    for name in state:
        largest = h.max()
        h, total = h / largest, total + largest.log()
        if name == "3.weight":
            h = nn.functional.linear(h.flatten(1), values[name])
        else:
            h = nn.functional.conv2d(h, values[name], padding=1 if name == "0.weight" else 0)
        if name == "1.weight":
            h = h.flatten(1)
    total = total + h.sum().log()
    gradients = torch.autograd.grad(total, list(values.values()))
    assert objective == pytest.approx(total.item(), rel=1e-12)
    for name, gradient in zip(values, gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_a_flow_is_reusable() -> None:
    model, x = zoo.create("resnet20", seed=0), torch.ones(1, 3, 32, 32)
    state = state_of(model)
    flow = Flow(trace(model, x), Semantics(1, "scale"))
    first = flow.forward(state)
    seen: list[list[float]] = []
    for _ in range(2):
        sums: list[float] = []
        assert flow.forward(state) == first
        flow.backward(lambda v, sums=sums: sums.append(float(v.g.sum())))
        seen.append(sums)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 22


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_are_named(bad: float) -> None:
    model = zoo.create("mlp", sizes=(4, 5, 3))
    with torch.no_grad():
        model.layers[3].weight[0, 0] = bad
    flow = Flow(trace(model, torch.ones(1, 4)), Semantics(1))
    with pytest.raises(NonFiniteScoreError, match=r"at layers\.3\.weight: its weights are not"):
        flow.forward(state_of(model))


def test_meta_weights_can_be_counted_but_not_weighed() -> None:
    with torch.device("meta"):
        model = zoo.create("mlp", sizes=(4, 5, 3))
    graph, state = trace(model, torch.ones(1, 4)), state_of(model)
    assert Flow(graph, Semantics(0)).forward(state) == pytest.approx(math.log(60), rel=1e-6)
    with pytest.raises(ValueError, match=r"layers\.1\.weight is on the meta device"):
        Flow(graph, Semantics(1)).forward(state)


def test_total_is_mantissa_and_exponent() -> None:
    model = mlp([[[4, 4]], [[2], [1]]])
    flow = Flow(trace(model, torch.ones(1, 2)), Semantics(1))
    log_total = flow.forward(state_of(model))
    mantissa, exponent = flow.total
    assert Fraction(mantissa) * Fraction(2) ** exponent == 24
    assert log_total == flow.log_total == pytest.approx(math.log(24), rel=1e-15)


def test_a_model_on_several_devices_is_refused() -> None:
    def on(device: str) -> SimpleNamespace:
        found = torch.device(device)
        return SimpleNamespace(
            device=found, is_meta=found.type == "meta", is_cpu=found.type == "cpu"
        )

    assert device_of({}) == torch.device("cpu")
    assert device_of({"a": on("meta"), "b": on("cpu")}) == torch.device("cpu")
    assert device_of({"a": on("cuda:1"), "b": on("meta")}) == torch.device("cuda:1")
    for first, second in (("cpu", "cuda:0"), ("cuda:0", "cuda:1")):
        with pytest.raises(ValueError, match=f"on {first} and {second}; move them to one device"):
            device_of({"a": on(first), "b": on(second)})
