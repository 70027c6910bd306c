"""Channels pruned early: the ticket or the settled weights, then training, then a smaller model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paikern as pk
from python_tests.training import nets


def early(name: str, opt: Any, model: Any, method: str, **more: Any) -> Any:
    own = {"latest": 2} if name == "earlycrop_s" else {"window": 2, "tolerance": 1.0}
    return pk.pruner(
        name,
        model,
        sparsity=0.5,
        epochs=4,
        optimizer=opt,
        data=nets.samples("residual"),
        method=method,
        **own,
        **more,
    )


CASES = [("earlycrop_s", "crop_s"), ("earlycrop_s", "snap"), ("earlybird_ticket", "earlybird")]


@pytest.mark.parametrize("target", ["nodes", "weights"])
@pytest.mark.parametrize(("name", "method"), CASES)
def test_channels_stay_pruned_and_can_be_removed(name: str, method: str, target: str) -> None:
    model = nets.make("residual")
    opt = nets.adam(model)
    pruner = early(name, opt, model, method, method_options={"target": target})
    for epoch in range(1, 5):
        nets.train_epoch(model, opt, "residual")
        event = pruner.on_epoch_end(model)
        assert event.pruned == (epoch == 2)
    masks = pruner.masks
    masks.verify(model)
    if target == "nodes":
        assert masks.node_sparsity == 0.5
    else:  # channels go one by one, so that the fraction of weights is met as closely as they can
        assert 0.4 < masks.sparsity < 0.75
    model.eval()
    x, _ = nets.samples("residual")
    small = pk.shrink(model, masks, example_inputs=x[:1])
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.allclose(small.eval()(x), model(x), atol=1e-5)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_channels_go_on_from_a_state(name: str, method: str) -> None:
    model = nets.make("residual")
    opt = nets.adam(model)
    pruner = early(name, opt, model, method)
    for _ in range(2):
        nets.train_epoch(model, opt, "residual")
        pruner.on_epoch_end(model)
    again = nets.make("residual")
    other = early(name, nets.adam(again), again, method)
    other.load_state_dict(pruner.state_dict())
    assert other.masks == pruner.masks
    assert other.masks.node_sparsity == 0.5
    for layer, kept in pruner.masks.channels.items():
        assert torch.equal(other.masks.channels[layer], kept)
    assert not other.on_epoch_end(again).pruned


def test_earlycrop_s_prunes_by_crop_s() -> None:
    model = nets.make("residual")
    data = nets.samples("residual")
    pruner = early("earlycrop_s", None, model, "crop_s", seed=5)
    for step in (1.1, 1.3):
        with torch.no_grad():
            model.conv.weight.mul_(step)
        expected = pk.prune(model, "crop_s", sparsity=0.5, data=data, seed=5, apply=False)
        event = pruner.on_epoch_end(model)
    assert event.pruned
    assert pruner.masks == expected
