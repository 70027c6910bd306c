"""ProsPr by channels against gates in one graph through all steps, and its masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from python_tests.channel_nets import COUPLED
from python_tests.oracles import channels as oracle
from python_tests.oracles.prospr import prospr_channel_scores
from python_tests.scorers.data_nets import assert_same_state, state_of
from python_tests.scorers.test_channel_scores import NETS, by_group, data_for

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "momentum": {"momentum": 0.5, "steps": 2},
    "first order": {"order": "first", "momentum": 0.5},
    "eval": {"mode": "eval", "lr": 0.01},
}


def batches_for(name: str, count: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    net, batches = data_for(name)
    return net, [batches[number % len(batches)] for number in range(count)]


def batches_in(batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Any]:
    return [(x.to(dtype), y) for x, y in batches]


def wanted(name: str, setting: str) -> dict[str, Tensor]:
    options = {"lr": 0.05, "steps": 2, **SETTINGS[setting]}
    net, batches = batches_for(name, options.pop("steps") + 1)
    layers = [layer for group in COUPLED[name] for layer in group]
    return by_group(name, prospr_channel_scores(net, layers, batches, **options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("name", NETS)
def test_scores_are_those_of_gates_through_the_steps(
    name: str, setting: str, dtype: torch.dtype
) -> None:
    options = {"lr": 0.05, "steps": 2, **SETTINGS[setting]}
    net, batches = batches_for(name, options["steps"] + 1)
    net = net.to(dtype)
    before = state_of(net)
    found = pk.score(net, "prospr_s", data=batches_in(batches, dtype), **options)
    assert_same_state(net, before)
    scores = wanted(name, setting)
    # In float32 the error is relative to the terms of the sums, not to what is left of them.
    weights = pk.score(net.double(), "prospr", data=batches_in(batches, torch.float64), **options)
    terms = max(float(weights.dense(name).flatten(1).sum(1).max()) for name in found)
    for group, expected in scores.items():
        score = found.dense(f"{group}.weight", torch.float64)
        if dtype == torch.float64:
            torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-12)
        else:
            assert float((score - expected).abs().max()) <= 5e-5 * terms, group


@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_kept_channels_are_those_of_the_oracle(name: str) -> None:
    net, batches = batches_for(name, 3)
    net = net.double()
    data = batches_in(batches, torch.float64)
    masks = pk.prune(net, "prospr_s", sparsity=0.6, data=data, lr=0.05, steps=2)
    scores = wanted(name, "default")
    nodes = {group[0]: len(group) for group in COUPLED[name]}
    total = sum(nodes[group] * len(values) for group, values in scores.items())
    expected = oracle.select(scores, nodes, oracle.nodes_kept(total, 0.6))
    for group in COUPLED[name]:
        for layer in group:
            assert masks.channels[f"{layer}.weight"].tolist() == expected[group[0]], layer
    masks.verify(net)


def test_one_step_by_hand() -> None:
    """L = y**2 / 2 of y = v w x at x = 1, a step by both weights, then the same loss again.

    With w = c w0: g_w = v**2 w, g_v = w**2 v; w1 = w (1 - h v**2), v1 = v (1 - h w**2).
    """
    w0, v0, h = 0.6, 0.8, 0.25
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.fill_(w0)
        net[1].weight.fill_(v0)
    data = (torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    found = pk.score(
        net, "prospr_s", data=data, steps=1, batches=1, lr=h,
        loss_fn=lambda y, t: (y - t).square().mean() / 2,
    )  # fmt: skip
    assert list(found) == ["0.weight"]  # outputs of the model are not ranked
    y1 = w0 * v0 * (1 - h * v0**2) * (1 - h * w0**2)
    slope = v0 * (1 - h * v0**2) * (1 - 3 * h * w0**2) * w0  # dy1 / dc
    assert found.dense("0.weight").item() == pytest.approx(abs(y1 * slope))


def test_a_frozen_bias_has_a_gate_and_does_not_move() -> None:
    net, batches = batches_for("mlp", 3)
    net = net.double()
    net.layers[1].bias.requires_grad_(False)
    with torch.no_grad():
        net.layers[1].bias.normal_(generator=torch.Generator().manual_seed(0))
    data = batches_in(batches, torch.float64)
    found = pk.score(net, "prospr_s", data=data, steps=2, lr=0.05)
    layers = ["layers.1", "layers.3"]
    for name, expected in prospr_channel_scores(net, layers, data, lr=0.05).items():
        torch.testing.assert_close(found.dense(f"{name}.weight", torch.float64), expected)
    assert not net.layers[1].bias.requires_grad


@pytest.mark.parametrize("name", ["mlp", "vgg", "gated"])
def test_tends_to_snap(name: str) -> None:
    """One step that goes nowhere, on the batch of the loss."""
    net, batches = data_for(name)
    options: dict[str, Any] = {"data": batches[:1], "mode": "eval"}
    found = pk.score(net, "prospr_s", steps=1, lr=1e-7, batches=1, **options)
    snap = pk.score(net, "snap", **options)
    for layer in snap:
        score, expected = found.dense(layer), snap.dense(layer)
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_a_masked_network_scores_as_the_smaller_one(name: str, mode: str) -> None:
    pytest.importorskip("torch_pruning")
    net, batches = batches_for(name, 3)
    net = net.double()
    data = batches_in(batches, torch.float64)
    masks = pk.prune(net, "random_s", sparsity=0.5, example_inputs=data[0][0], seed=2)
    small = pk.shrink(net, masks, example_inputs=data[0][0])
    options: dict[str, Any] = {"data": data, "steps": 2, "lr": 0.02, "mode": mode, "momentum": 0.5}
    masked = pk.score(net, "prospr_s", masks=masks, **options)
    expected = pk.score(small, "prospr_s", **options)
    for layer in expected:
        score = masked.dense(layer, torch.float64)[masks.channels[layer]]
        torch.testing.assert_close(score, expected.dense(layer, torch.float64))


@pytest.mark.parametrize("target", ["nodes", "weights"])
@pytest.mark.parametrize("name", ["mlp", "vgg", "residual", "dense", "mobile"])
@pytest.mark.filterwarnings("ignore:.*would have lost:paikern.PaikernWarning")
@pytest.mark.filterwarnings("ignore:.*keep all of their:paikern.PaikernWarning")
def test_counts_and_the_smaller_network(name: str, target: str) -> None:
    pytest.importorskip("torch_pruning")
    net, batches = batches_for(name, 4)
    masks = pk.prune(net, "prospr_s", sparsity=0.5, target=target, data=batches, lr=0.01)
    total = sum(kept.numel() for kept in masks.channels.values())
    if target == "nodes":
        kept = sum(int(kept.sum()) for kept in masks.channels.values())
        assert kept == oracle.nodes_kept(total, 0.5)
    else:
        most = max(dict(net.named_parameters())[n].numel() for n in masks)
        assert masks.total - masks.total // 2 - most < masks.kept <= masks.total - masks.total // 2
    net.eval()
    x = batches[0][0]
    small = pk.shrink(net, masks, example_inputs=x).eval()
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)
    held = dict(small.named_parameters())
    assert sum(held[n].numel() for n in masks) == masks.kept


@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_rounds_remove_exactly_and_bring_nothing_back() -> None:
    net, batches = batches_for("resnet20", 4)
    options: dict[str, Any] = {"data": batches, "apply": False, "steps": 1, "schedule": "linear"}
    masks = pk.prune(net, "prospr_s", sparsity=0.6, rounds=3, **options)
    found = [round(row["density"] * 784) for row in masks.metadata["history"]]
    assert found == [oracle.nodes_kept(784, s) for s in (0.2, 0.4, 0.6)]
    assert all(bool(kept.any()) for kept in masks.channels.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"order": "second"}, "order must be"),
        ({"mode": "test"}, "mode must be"),
        ({"target": "filters"}, "target must be one of"),
        ({"variant": "published"}, "no 'published' variant"),
        ({"pattern": "2:4"}, "prospr_s removes whole channels"),
        ({"steps": 9}, "there are only 3"),
        ({"ignore": ["0.0", "2.0", "4"]}, "no channel that prospr_s could remove"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    net, batches = data_for("vgg")
    before = state_of(net)
    with pytest.raises(ValueError, match=message):
        pk.prune(net, "prospr_s", sparsity=0.5, data=batches, **{"steps": 2, **options})
    assert_same_state(net, before)


def test_an_error_in_a_step_leaves_the_model_as_it_was() -> None:
    net, batches = data_for("residual")
    net.train()
    net.stem[1].eval()
    before, random = state_of(net), torch.get_rng_state()
    calls = []

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)
        loss = nn.functional.cross_entropy(outputs, targets)
        return loss * (torch.nan if len(calls) == 3 else 1.0)

    with pytest.raises(ValueError, match="the loss of batch 2 is nan"):
        pk.prune(net, "prospr_s", sparsity=0.5, data=batches, steps=2, loss_fn=broken)
    assert_same_state(net, before)
    assert torch.equal(torch.get_rng_state(), random)
