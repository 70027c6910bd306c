"""analyze() against float64 autograd: counts equal one by one, log paths to the last digits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from python_tests.oracles import topology_oracle
from python_tests.oracles.brute_force import brute_force
from python_tests.oracles.goldens import DPAI_KERNELS, DPAI_MASKS, DPAI_NODES, DPAI_PATHS


def assert_agrees(model: nn.Module, masks: pk.MaskSet | None, x: Tensor) -> None:
    found = pk.analyze(model, masks, example_inputs=x)
    expected = topology_oracle(model, None if masks is None else dict(masks), x)
    for layer in found.layers:
        counts = expected.layers[layer.name]
        assert (
            layer.kept,
            layer.numel,
            layer.effective_nodes,
            layer.nodes,
            layer.effective_kernels,
            layer.kernels,
            layer.effective_params,
            layer.dead_channels,
        ) == (
            counts.kept,
            counts.numel,
            counts.effective_nodes,
            counts.nodes,
            counts.effective_kernels,
            counts.kernels,
            counts.effective_params,
            counts.dead_channels,
        ), layer.name
    assert [layer.name for layer in found.layers] == list(expected.layers)
    assert found.effective_nodes == expected.effective_nodes
    assert found.effective_kernels == expected.effective_kernels
    assert found.effective_params == expected.effective_params
    assert found.log_paths == pytest.approx(expected.log_paths, rel=1e-12, abs=1e-12)


def masks_of(model: nn.Module, method: str, sparsity: float, x: Tensor) -> pk.MaskSet:
    """Random masks under ERK budgets, the largest weights, or a short SynFlow run."""
    options: dict[str, Any] = {
        "random": {"scope": "erk"},
        "magnitude": {},
        "synflow": {"example_inputs": x, "rounds": 3, "progress": False},
    }[method]
    return pk.prune(model, method, sparsity=sparsity, apply=False, **options)


CASES = [
    ("mlp", (784,)),
    ("lenet300", (784,)),
    ("resnet20", (3, 32, 32)),
    ("resnet18", (3, 32, 32)),
]
LARGE = [
    ("vgg16_bn", (3, 32, 32)),
    ("vgg19_bn", (3, 32, 32)),
    ("resnet18", (3, 224, 224)),
    ("resnet50", (3, 224, 224)),
]
_SLOW = pytest.mark.slow
ALL = [*CASES, *(pytest.param(name, shape, marks=_SLOW) for name, shape in LARGE)]


@pytest.mark.parametrize(("name", "shape"), ALL)
def test_dense(name: str, shape: tuple[int, ...]) -> None:
    assert_agrees(zoo.create(name, seed=0), None, torch.ones(1, *shape))


@pytest.mark.parametrize("sparsity", [0.9, 0.98])
@pytest.mark.parametrize("method", ["random", "magnitude", "synflow"])
@pytest.mark.parametrize(("name", "shape"), ALL)
@pytest.mark.filterwarnings("ignore:layer collapse:paikern.errors.PaikernWarning")
def test_masked(name: str, shape: tuple[int, ...], method: str, sparsity: float) -> None:
    model, x = zoo.create(name, seed=0), torch.ones(1, *shape)
    assert_agrees(model, masks_of(model, method, sparsity, x), x)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.98])
def test_vision_transformer(sparsity: float) -> None:
    model = zoo.create("vit_b_16", seed=0, layers=2, dim=48, heads=4, image_size=32, num_classes=10)
    x = zoo.example_input(model)
    assert_agrees(model, masks_of(model, "random", sparsity, x), x)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.98])
def test_gpt2(sparsity: float, conv1d: bool) -> None:
    model = zoo.create(
        "gpt2", seed=0, layers=2, dim=48, heads=4, vocabulary=100, conv1d=conv1d, tied=False
    )
    x = zoo.example_input(model)
    assert_agrees(model, masks_of(model, "random", sparsity, x), x)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.98])
def test_llama(sparsity: float) -> None:
    model = zoo.create("llama-tiny", seed=0)
    x = zoo.example_input(model)
    assert_agrees(model, masks_of(model, "random", sparsity, x), x)


@st.composite
def chains(draw: st.DrawFn) -> list[Tensor]:
    """0/1 matrices `[out, in]` of an MLP with up to 4 layers of up to 4 units."""
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    seed = draw(st.integers(0, 2**31))
    density = draw(st.sampled_from([0.3, 0.6, 0.9]))
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(o, i, generator=generator) < density) for i, o in itertools.pairwise(widths)
    ]


@given(chains())
@settings(max_examples=40, deadline=None)
def test_every_path_of_a_small_mlp(layers: list[Tensor]) -> None:
    sizes = [layers[0].shape[1], *(m.shape[0] for m in layers)]
    model = zoo.create("mlp", sizes=sizes)
    names = [n for n, p in model.named_parameters() if p.dim() == 2]
    masks = pk.MaskSet.from_bool(dict(zip(names, layers, strict=True)))
    found = pk.analyze(model, masks, example_inputs=torch.ones(1, sizes[0]))
    expected = brute_force([m.long().tolist() for m in layers])
    assert found.effective_nodes == expected.nodes
    assert found.effective_params == found.effective_kernels == expected.weights
    if expected.total:
        assert found.log_paths == pytest.approx(math.log(expected.total), abs=1e-12)
    else:
        assert found.log_paths == -math.inf


def worked_example() -> tuple[nn.Module, pk.MaskSet]:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    first, second = (torch.tensor(m).bool() for m in DPAI_MASKS)
    return model, pk.MaskSet.from_bool({"0.weight": first, "2.weight": second})


def test_worked_example() -> None:
    model, masks = worked_example()
    top = pk.analyze(model, masks, example_inputs=torch.ones(1, 3))
    assert top.log_paths == pytest.approx(math.log(DPAI_PATHS), abs=1e-15)
    assert tuple(layer.effective_nodes for layer in top.layers) == DPAI_NODES
    assert top.effective_kernels == DPAI_KERNELS
    assert (top.kept, top.numel) == (5, 10)
    assert top.dead_channels == {"2.weight": (1,)}
    assert top.dead_layers == ()
    assert top.layers[1].density == 0.5


def test_dead_layer_is_named() -> None:
    model, masks = worked_example()
    cut = pk.MaskSet.from_bool({**masks, "2.weight": torch.zeros(2, 2, dtype=torch.bool)})
    top = pk.analyze(model, cut, example_inputs=torch.ones(1, 3))
    assert top.log_paths == -math.inf
    assert top.dead_layers == ("0.weight", "2.weight")
    assert top.effective_nodes == top.effective_params == 0
    assert top.layers[0].dead
    assert top.layers[0].kept == 3


def test_grouped_transposed_convolution() -> None:
    """Stored `[in, out / groups]`: output channels are counted over the groups."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    )
    keep = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    keep[:2, 1] = False  # inputs 0, 1 are group 0: its output channel 1 is dead
    masks = pk.MaskSet.from_bool({"1.weight": keep})
    layer = pk.analyze(model, masks, example_inputs=torch.ones(1, 2, 5, 5)).layers[1]
    assert (layer.kind, layer.nodes, layer.effective_nodes) == ("conv_transpose2d", 6, 5)
    assert layer.dead_channels == (1,)
    assert (layer.kernels, layer.effective_kernels) == (12, 10)


def test_fused_projection_counts_its_rows() -> None:
    model = nn.MultiheadAttention(6, 2, batch_first=True)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    keep = torch.ones(18, 6, dtype=torch.bool)
    keep[7] = False
    masks = pk.MaskSet.from_bool({"attention.in_proj_weight": keep})
    top = pk.analyze(Wrapped(), masks, example_inputs=torch.ones(1, 5, 6))
    assert top.layers[0].kind == "attention"
    assert top.layers[0].dead_channels == (7,)
    assert top.layers[0].effective_params == 17 * 6


def test_unused_layer_is_dead() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(3, 2)
            self.unused = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.used(x)
            return y

    top = pk.analyze(Net(), example_inputs=torch.ones(1, 3))
    assert top.dead_layers == ("unused.weight",)


def test_values_are_never_read() -> None:
    with torch.device("meta"):
        shapes_only = zoo.create("resnet20")
    model = zoo.create("resnet20")
    x = torch.ones(1, 3, 32, 32)
    masks = pk.prune(model, "random", sparsity=0.9, apply=False)
    with torch.no_grad():
        model.conv1.weight.fill_(math.nan)
    expected = pk.analyze(model, masks, example_inputs=x)
    assert pk.analyze(shapes_only, masks, example_inputs=x) == expected
    meta_input = zoo.example_input(shapes_only)
    assert pk.analyze(shapes_only, masks, example_inputs=meta_input) == expected


def test_zeros_of_a_pruned_model() -> None:
    model, x = zoo.create("lenet300"), torch.ones(1, 784)
    masks = pk.prune(model, "magnitude", sparsity=0.95)
    read = pk.MaskSet.from_model(model)
    assert pk.analyze(model, read, example_inputs=x) == pk.analyze(model, masks, example_inputs=x)


def test_ignore_leaves_a_layer_out_of_the_report() -> None:
    model, masks = worked_example()
    whole = pk.analyze(model, masks, example_inputs=torch.ones(1, 3))
    part = pk.analyze(model, masks, example_inputs=torch.ones(1, 3), ignore=["0"])
    assert part.log_paths == whole.log_paths
    assert part.layers == whole.layers[1:]


def test_missing_inputs() -> None:
    with pytest.raises(ValueError, match=r"example_inputs: .* for instance"):
        pk.analyze(nn.Linear(2, 2), example_inputs=None)


def test_masks_of_another_model() -> None:
    model, _ = worked_example()
    other = pk.MaskSet.from_bool({"0.weight": torch.ones(5, 3, dtype=torch.bool)})
    with pytest.raises(pk.MaskFormatError, match=r"0.weight has shape \[2, 3\], its mask \[5, 3\]"):
        pk.analyze(model, other, example_inputs=torch.ones(1, 3))
    unknown = pk.MaskSet.from_bool({"9.weight": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(pk.MaskFormatError, match=r"no parameter '9.weight'"):
        pk.analyze(model, unknown, example_inputs=torch.ones(1, 3))
