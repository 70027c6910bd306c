"""A network without the channels computes what the masked one computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.errors import MaskFormatError, PaikernError
from python_tests.channel_nets import BUILDERS, build
from python_tests.scorers import data_nets

pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_the_smaller_network_computes_the_same(name: str, sparsity: float) -> None:
    net, x = build(name)
    masks = pk.prune(net, "random_s", sparsity=sparsity, example_inputs=x, seed=3)
    small = pk.shrink(net, masks, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)
    for mask, (parameter, kept) in zip(masks.values(), masks.channels.items(), strict=False):
        assert parameter in dict(small.named_parameters()), mask.shape
        assert int(kept.sum()) >= 1
    weights = dict(small.named_parameters())
    assert sum(weights[name].numel() for name in masks) == masks.kept
    assert list(weights) == [name for name, _ in net.named_parameters()]


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "resnet50"])
def test_whole_architectures(name: str) -> None:
    torch.manual_seed(0)
    net = pk.zoo.create(name, num_classes=10, image_size=32, seed=0).eval()
    x = torch.randn(2, 3, 32, 32)
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    small = pk.shrink(net, masks, example_inputs=x)
    with torch.no_grad():
        wanted, found = net(x), small(x)
    assert float((wanted - found).abs().max()) <= 1e-5 * float(wanted.abs().max())
    weights = dict(small.named_parameters())
    assert sum(weights[name].numel() for name in masks) == masks.kept < 0.3 * masks.total


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", ["l1_filters", "snap", "crop_s"])
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_hidden_layers_of_transformers(name: str, method: str) -> None:
    net, data = data_nets.transformer(name)
    net.eval()
    masks = pk.prune(net, method, sparsity=0.5, data=data)
    assert masks.node_sparsity == 0.5
    inputs = {key: value for key, value in data.items() if key != "labels"}
    small = pk.shrink(net, masks, example_inputs=inputs)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, net(**inputs).logits)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


def test_it_works_from_masks_that_were_not_applied() -> None:
    net, x = build("residual")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x, apply=False)
    small = pk.shrink(net, masks, example_inputs=x)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    masks.apply(net)
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


def test_modes_and_frozen_parameters_are_kept() -> None:
    net, x = build("vgg")
    net.train()
    net[0][1].eval()
    net[0][1].weight.requires_grad_(False)
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    small = pk.shrink(net, masks, example_inputs=x)
    assert [m.training for m in small.modules()] == [m.training for m in net.modules()]
    assert not small[0][1].weight.requires_grad
    assert small[0][0].weight.requires_grad


def test_it_trains_and_exports() -> None:
    net, x = build("residual")
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    small = pk.shrink(net, masks, example_inputs=x).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05, momentum=0.9)
    labels = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(small(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    small.eval()
    program = torch.export.export(small, (x,))
    torch.testing.assert_close(program.module()(x), small(x))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters()) / 2


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_goes_on_with_the_same_optimizer(kind: str) -> None:
    net, x = build("residual")
    net, x, labels = net.double().train(), x.double(), torch.tensor([0, 1, 2, 3])
    optimizer = (
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        if kind == "sgd"
        else torch.optim.AdamW(net.parameters(), lr=0.01)
    )
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)

    def train(model: nn.Module, chosen: torch.optim.Optimizer) -> None:
        for _ in range(3):
            chosen.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            chosen.step()

    with masks.attach(net, optimizer):
        train(net, optimizer)
        twin = copy.deepcopy(net)
        state = copy.deepcopy(optimizer.state_dict())
        train(net, optimizer)
        expected = net.eval()(x)
    again = type(optimizer)(twin.parameters(), lr=0.1)
    again.load_state_dict(state)
    small = pk.shrink(twin, masks, example_inputs=x, optimizer=again)
    assert [p for group in again.param_groups for p in group["params"]] == list(small.parameters())
    train(small, again)
    torch.testing.assert_close(small.eval()(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vgg", "gated"])
def test_layers_that_no_norm_follows_stay_whole_with_earlybird(name: str) -> None:
    net, x = build(name)
    with pytest.warns(pk.PaikernWarning, match="no batch norm with weights follows it"):
        masks = pk.prune(net, "earlybird", sparsity=0.5, example_inputs=x)
    small = pk.shrink(net, masks, example_inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


def test_masks_of_single_weights_are_refused() -> None:
    net, x = build("mlp")
    masks = pk.prune(net, "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match="made of single weights"):
        pk.shrink(net, masks, example_inputs=x)


def test_masks_of_another_model_are_refused() -> None:
    net, x = build("mlp")
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    with pytest.raises(MaskFormatError, match="another model"):
        pk.shrink(pk.zoo.create("mlp", sizes=(5, 7, 8, 3)), masks, example_inputs=x)


def test_a_model_that_is_cut_wrongly_is_not_returned() -> None:
    class Shifted(nn.Module):
        """A shift that no layer owns."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
            self.shift = nn.Parameter(torch.randn(6, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x) + self.shift.prod(1)))

    net, x = Shifted(), torch.randn(4, 5)
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    with pytest.raises(PaikernError, match="does not compute what the masked one does"):
        pk.shrink(net, masks, example_inputs=x)


def test_neither_model_nor_masks() -> None:
    net, x = build("mlp")
    wrong: Any = {}
    with pytest.raises(TypeError, match=r"masks must be the MaskSet of pk.prune, got dict"):
        pk.shrink(net, wrong, example_inputs=x)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        pk.shrink(wrong, pk.MaskSet.from_model(net), example_inputs=x)
