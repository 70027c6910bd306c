"""Conservation: on bias-free networks the scores of every layer cut add up to R.

SynFlow (p = 1) and SynFlow-L2 (a) (p = 2), on maps and on channel vectors. Float32 with exponents
is held against float64, where R itself is added up, and not its logarithm.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from paikern.pathgraph import Flow, Semantics, shift_invariant, trace
from paikern.scorers.synflow import PathScorer, SynFlow, SynFlowL2
from python_tests.pathgraph.helpers import state_of

METHODS: dict[str, tuple[type[PathScorer], int]] = {
    "synflow": (SynFlow, 1),
    "synflow_l2": (SynFlowL2, 2),
}
CONVS = ("exact", "shift_invariant")

Cuts = list[tuple[str, ...]]
"""Parameters whose weights every path crosses exactly once, a cut each."""


class Plus(nn.Module):
    """A residual block: its shortcut is a cut with the first layer, and with the second."""

    def __init__(self, channels: int, out: int, stride: int, groups: int, padding: str) -> None:
        super().__init__()
        half = 2 * max(1, channels // 2)
        self.first = _conv(channels, half, 3, stride, 1, 1, padding)
        self.second = _conv(half, out, 3, 1, 1, groups, padding)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu()) + self.shortcut(x)
        return y


class Beside(nn.Module):
    """A concatenation of two convolutions, one of them dilated: together they are one cut."""

    def __init__(self, channels: int, out: int, padding: str) -> None:
        super().__init__()
        self.left = _conv(channels, out, 3, 1, 2, 1, padding)
        self.right = _conv(channels, out, 1, 1, 1, 1, padding)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def _conv(
    channels: int, out: int, kernel: int, stride: int, dilation: int, groups: int, padding: str
) -> nn.Conv2d:
    return nn.Conv2d(
        channels, out, kernel, stride, dilation * (kernel // 2), dilation, groups,
        bias=False, padding_mode=padding,
    )  # fmt: skip


def _scaled(model: nn.Module, draw: st.DrawFn) -> None:
    """Weights far from 1 in both directions, so that exponents have work to do.

    Norms stay near 1: their factor, squared, is not brought back into range before the next weight.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(draw(st.sampled_from([1e-12, 1e-3, 1.0, 1e3, 1e12])))


@st.composite
def mlps(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Cuts]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    sizes = draw(st.lists(st.integers(1, 12), min_size=2, max_size=6))
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.GELU())))
    _scaled(model, draw)
    cuts = [(f"{2 * i}.weight",) for i in range(len(layers))]
    return model, torch.ones(1, sizes[0]), cuts


@st.composite
def conv_nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Cuts]:
    """Chains of convolutions, residual blocks and concatenations under norms and pools."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    padding = draw(st.sampled_from(["zeros", "circular"]))
    channels, side = draw(st.sampled_from([1, 2, 3])), draw(st.integers(8, 11))
    x = torch.ones(1, channels, side, side)
    layers: list[nn.Module] = []
    cuts: Cuts = []
    for _ in range(draw(st.integers(1, 3))):
        name, out = str(len(layers)), draw(st.sampled_from([2, 4]))
        kind = draw(st.sampled_from(["conv", "plus", "beside"]))
        stride = draw(st.sampled_from([1, 2])) if side >= 8 else 1
        groups = draw(st.sampled_from([1, 2]))
        if kind == "conv":
            kernel = draw(st.sampled_from([1, 3]))
            dilation = draw(st.sampled_from([1, 2])) if side >= 8 else 1
            groups = groups if channels % 2 == 0 else 1
            layers.append(_conv(channels, out, kernel, stride, dilation, groups, padding))
            cuts.append((f"{name}.weight",))
        elif kind == "plus":
            layers.append(Plus(channels, out, stride, groups, padding))
            shortcut = f"{name}.shortcut.weight"
            cuts += [(f"{name}.{branch}.weight", shortcut) for branch in ("first", "second")]
        else:
            layers.append(Beside(channels, out, padding))
            cuts.append((f"{name}.left.weight", f"{name}.right.weight"))
            out, stride = 2 * out, 1
        channels, side = out, -(-side // stride)
        norm = nn.BatchNorm2d(channels)
        with torch.no_grad():
            norm.weight.normal_()
            norm.running_var.uniform_(0.5, 2.0)
        pools = [nn.Identity(), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]
        layers += [draw(st.sampled_from([nn.ReLU(), norm])), draw(st.sampled_from(pools))]
    layers += [draw(st.sampled_from([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2)]))]
    layers += [nn.Flatten(), nn.LazyLinear(3, bias=False)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model(x)
    _scaled(model, draw)
    return model, x, [*cuts, (f"{len(layers) - 1}.weight",)]


def true_total(model: nn.Module, x: Tensor, power: int, conv: str, packed: Mapping[str, Tensor]
) -> tuple[float, int]:  # fmt: skip
    """R as a mantissa and an exponent, from float64."""
    graph = trace(model, x)
    graph = graph if conv == "exact" else shift_invariant(graph)
    flow = Flow(graph, Semantics(power, "scale"), dtype=torch.float64)
    flow.forward(state_of(model), packed)
    return flow.total


def assert_conserved(
    model: nn.Module, x: Tensor, cuts: Cuts, method: str, conv: str, sparsity: float
) -> None:
    cls, power = METHODS[method]
    masks = pk.prune(model, "random", sparsity=sparsity, scope="local", apply=False)
    packed = {name: masks.packed(name) for name in masks}
    mantissa, exponent = true_total(model, x, power, conv, packed)
    if mantissa == 0:
        with pytest.raises(pk.PaikernError, match="no path from the input to the output is left"):
            pk.score(model, cls(conv=conv), example_inputs=x, masks=masks)
        return
    scores = pk.score(model, cls(conv=conv), example_inputs=x, masks=masks)
    assert set(scores) == {name for cut in cuts for name in cut}
    for cut in cuts:
        held = 0.0
        for name in cut:
            values = scores.dense(name, torch.float64, relative_to=exponent)
            kept = values[masks[name]]
            assert bool((kept >= 0).all())
            held += float(kept.sum())
        assert held == pytest.approx(mantissa, rel=1e-5), cut


@pytest.mark.parametrize("method", METHODS)
@given(mlps(), st.sampled_from(CONVS), st.sampled_from([0.0, 0.3]))
@settings(max_examples=25, deadline=None)
def test_mlps(
    method: str, case: tuple[nn.Module, Tensor, Cuts], conv: str, sparsity: float
) -> None:
    assert_conserved(*case, method, conv, sparsity)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("method", METHODS)
@given(conv_nets(), st.sampled_from([0.0, 0.3]))
@settings(max_examples=15, deadline=None)
def test_convolutional_networks(
    method: str, conv: str, case: tuple[nn.Module, Tensor, Cuts], sparsity: float
) -> None:
    """Padding with zeros or around, strides, dilation, groups, branches that meet and part."""
    assert_conserved(*case, method, conv, sparsity)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("method", METHODS)
def test_every_cut_of_resnet20(method: str, conv: str) -> None:
    """First and last layer; and the blocks whose shortcut has weights, counted with either layer.

    Past other blocks paths lead without a weight: those layers hold less than R.
    """
    model = zoo.create("resnet20", seed=0)
    cuts: Cuts = [("conv1.weight",), ("fc.weight",)]
    for stage in (2, 3):
        block = f"layer{stage}.0"
        cuts += [
            (f"{block}.{c}.weight", f"{block}.downsample.0.weight") for c in ("conv1", "conv2")
        ]
    x = torch.ones(1, 3, 32, 32)
    cls, power = METHODS[method]
    mantissa, exponent = true_total(model, x, power, conv, {})
    scores = pk.score(model, cls(conv=conv), example_inputs=x)
    assert {name for cut in cuts for name in cut} <= set(scores)
    for cut in cuts:
        held = sum(float(scores.dense(n, torch.float64, relative_to=exponent).sum()) for n in cut)
        assert held == pytest.approx(mantissa, rel=1e-5), cut
    inner = scores.dense("layer1.0.conv1.weight", torch.float64, relative_to=exponent)
    assert 0 < float(inner.sum()) < mantissa


@pytest.mark.parametrize("conv", CONVS)
def test_conservation_far_beyond_float64(conv: str) -> None:
    """R near 2**3000: no float holds it, mantissa and exponent do."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(60)), nn.Flatten(),
        nn.Linear(100, 2, bias=False),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e15)
    x = torch.ones(1, 4, 5, 5)
    mantissa, exponent = true_total(model, x, 1, conv, {})
    assert exponent > 3000
    assert math.isfinite(mantissa)
    cuts = [(name,) for name in pk.score(model, "synflow", example_inputs=x)]
    assert len(cuts) == 61
    assert_conserved(model, x, cuts, "synflow", conv, 0.0)
