"""EarlyCroP: both rules on made trajectories, the cap, what it refuses, real training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from python_tests.oracles import training as oracle
from python_tests.training import nets

#: How far each epoch is from the initial weights, as a fraction of them.
SETTLING = [0.1, 0.2, 0.26, 0.289, 0.3, 0.3023, 0.3026, 0.3026]
RESTLESS = [0.1, 0.25, 0.45, 0.7, 1.0, 1.4, 1.9, 2.5]


def walk(model: nn.Module, pruner: Any, steps: list[float]) -> list[pk.training.Event]:
    """Scale the prunable weights as `steps` say, epoch by epoch, until something is pruned."""
    held = {n: p for n, p in model.named_parameters() if n in pruner.masks}
    start = {n: p.detach().clone() for n, p in held.items()}
    events = []
    for step in steps:
        with torch.no_grad():
            for n, p in held.items():
                p.copy_(start[n] * (1 + step))
        events.append(pruner.on_epoch_end(model))
        if events[-1].pruned:
            break
    return events


def started(name: str = "earlycrop_u", **options: Any) -> tuple[nn.Module, Any]:
    model = nets.make("mlp")
    given = {"sparsity": 0.8, "epochs": 8, "method": "magnitude", "latest": 8, **options}
    return model, pk.pruner(name, model, **given)


@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.4, 2.0, 3.5])
def test_slides_rule(tolerance: float) -> None:
    model, pruner = started(tolerance=tolerance)
    events = walk(model, pruner, SETTLING)
    assert len(events) == oracle.slides_epoch([s * s for s in SETTLING], tolerance)
    for event, step in zip(events, SETTLING, strict=False):
        assert event.values["distance"] == pytest.approx(step * step, rel=1e-5)
    last = events[-1].values
    assert last["change"] < last["threshold"] == pytest.approx(tolerance * 0.01, rel=1e-5)
    assert events[-1].kept == pruner.total - int(0.8 * pruner.total)
    pruner.masks.verify(model)


@pytest.mark.parametrize(
    ("name", "sparsity", "margin"),
    [
        ("earlycrop_u", 0.5, 0.5),
        ("earlycrop_u", 0.8, 0.2),
        ("earlycrop_u", 0.98, 0.02),
        ("earlycrop_s", 0.5, 0.4),
        ("earlycrop_s", 0.8, 0.1),
    ],
)
def test_published_rule(name: str, sparsity: float, margin: float) -> None:
    model, pruner = started(name, sparsity=sparsity, rule="published")
    events = walk(model, pruner, SETTLING)
    distances = [(s - SETTLING[0]) / (1 + SETTLING[0]) for s in SETTLING]
    assert len(events) == oracle.published_epoch(distances, margin)
    for event, distance in zip(events, distances, strict=False):
        assert event.values["distance"] == pytest.approx(distance, rel=1e-5)
    assert "the distance changed by" in events[-1].reason


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_published_rule_for_channels_never_fires_at_high_sparsity(sparsity: float) -> None:
    model, pruner = started("earlycrop_s", sparsity=sparsity, rule="published")
    events = walk(model, pruner, SETTLING)
    assert len(events) == 8
    assert "epoch 8 is the latest, and the weights have not settled" in events[-1].reason
    assert pruner.threshold is not None
    assert pruner.threshold <= 1e-12


@pytest.mark.parametrize("rule", ["slides", "published"])
def test_the_latest_epoch_prunes(rule: str) -> None:
    model, pruner = started(rule=rule, latest=5)
    events = walk(model, pruner, RESTLESS)
    assert [event.pruned for event in events] == [False] * 4 + [True]
    assert "not settled" in events[-1].reason
    assert not pruner.on_epoch_end(model).pruned
    assert pruner.masks.metadata["pruner"] == "earlycrop_u"
    assert pruner.masks.metadata["epoch"] == 5


@pytest.mark.parametrize(("epochs", "latest"), [(1, 1), (2, 1), (60, 30), (500, 100)])
def test_default_of_the_latest_epoch(epochs: int, latest: int) -> None:
    assert started(epochs=epochs, latest=None)[1]._latest == latest


@pytest.mark.parametrize("rule", ["slides", "published"])
@pytest.mark.parametrize("parameters", ["prunable", "all"])
@pytest.mark.parametrize("name", nets.NETS)
def test_distances_of_training(name: str, parameters: str, rule: str) -> None:
    model = nets.make(name)
    opt = nets.adam(model)
    pruner = pk.pruner(
        "earlycrop_u",
        model,
        sparsity=0.5,
        epochs=20,
        optimizer=opt,
        method="magnitude",
        rule=rule,
        parameters=parameters,
        tolerance=1e-9,
    )
    start = copy64(model, pruner, parameters)
    for epoch in (1, 2, 3):
        nets.train_epoch(model, opt, name)
        if rule == "published" and epoch == 1:
            start = copy64(model, pruner, parameters)
        event = pruner.on_epoch_end(model)
        now = copy64(model, pruner, parameters)
        square = sum(float((now[n] - start[n]).square().sum()) for n in start)
        square /= sum(float(w.square().sum()) for w in start.values())
        expected = square if rule == "slides" else math.sqrt(square)
        assert event.values["distance"] == pytest.approx(expected, rel=1e-5)
        if event.pruned:
            break


def copy64(model: nn.Module, pruner: Any, parameters: str) -> dict[str, torch.Tensor]:
    return {
        n: p.detach().double().clone()
        for n, p in model.named_parameters()
        if parameters == "all" or n in pruner.masks
    }


@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.parametrize("name", nets.NETS)
def test_prunes_by_crop(name: str) -> None:
    model = nets.make(name)
    opt = nets.adam(model)
    data = nets.samples(name)
    pruner = pk.pruner(
        "earlycrop_u", model, sparsity=0.7, epochs=6, optimizer=opt, data=data, latest=2, seed=4
    )
    for _ in range(2):
        nets.train_epoch(model, opt, name)
        expected = pk.prune(model, "crop", sparsity=0.7, data=data, seed=4, apply=False)
        before, rng = nets.copy_of(model), torch.get_rng_state()
        event = pruner.on_epoch_end(model)
        assert torch.equal(torch.get_rng_state(), rng)
    assert event.pruned
    assert pruner.masks == expected
    for n, value in model.state_dict().items():
        mask = expected[n] if n in expected else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, torch.where(mask, before[n], 0)), n


@pytest.mark.parametrize(("rule", "epoch"), [("slides", 1), ("published", 2)])
def test_weights_that_do_not_move_are_an_error(rule: str, epoch: int) -> None:
    model, pruner = started(rule=rule)
    for _ in range(epoch - 1):
        pruner.on_epoch_end(model)
    with pytest.raises(ValueError, match=f"epoch {epoch}: no weight has moved"):
        pruner.on_epoch_end(model)
    assert pruner.epoch == epoch - 1
    assert len(pruner.distances) == epoch - 1
    with torch.no_grad():
        model[1].weight.mul_(2)
    assert pruner.on_epoch_end(model).epoch == epoch


def test_nan_names_the_epoch() -> None:
    model, pruner = started()
    walk(model, pruner, SETTLING[:1])
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with pytest.raises(pk.NonFiniteScoreError, match=r"epoch 2: 1\.weight holds 1 NaN"):
        pruner.on_epoch_end(model)
    assert pruner.distances == [pytest.approx(0.01, rel=1e-5)]


def test_a_failing_score_leaves_everything() -> None:
    model, pruner = started(latest=1)
    before, reference = nets.copy_of(model), pruner._reference
    pruner.method_options = {"rounds": 0}
    with torch.no_grad():
        model[1].weight.mul_(1.1)
    before = nets.copy_of(model)
    with pytest.raises(ValueError, match="rounds must be >= 1"):
        pruner.on_epoch_end(model)
    assert nets.equal_states(before, nets.copy_of(model))
    assert pruner._reference is reference
    assert (pruner.epoch, pruner.distances, pruner.pruned_at) == (0, [], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "paper"}, "rule must be one of"),
        ({"tolerance": 0.0}, "tolerance must be > 0, got 0.0"),
        ({"latest": 9}, r"latest must be in \[1, 8\], got 9"),
        ({"parameters": "some"}, "parameters must be one of"),
        ({"method": "crp"}, "unknown method 'crp'"),
        ({"method": "snip"}, "method 'snip' reads samples; pass data="),
        ({"method": "synflow"}, "method 'synflow' traces the model and needs one input"),
        ({"method_options": {"sparsity": 0.5}}, "give sparsity to pk.pruner itself"),
        ({"method_options": {"batchs": 3}}, "batchs: method 'magnitude' has no such option"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        started(**options)


def test_zero_weights_have_no_distance() -> None:
    model = nets.make("mlp")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with pytest.raises(ValueError, match="the initial weights are all 0 or NaN"):
        pk.pruner("earlycrop_u", model, sparsity=0.5, epochs=3, method="magnitude")


def test_a_restored_reference_is_summed_in_the_same_order() -> None:
    model = nets.make("residual")
    pruner = pk.pruner("earlycrop_u", model, sparsity=0.5, epochs=9, data=nets.samples("residual"))
    names = list(pruner._reference)
    assert names != sorted(names)
    state = pruner.state_dict()
    state["tensors"] = {key: state["tensors"][key] for key in sorted(state["tensors"])}
    pruner.load_state_dict(state)
    assert list(pruner._reference) == names
