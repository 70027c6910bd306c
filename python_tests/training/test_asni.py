"""ASNI: schedule, masks of every epoch against sorts, nesting, centroids."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.training import Centroids
from python_tests.oracles import training as oracle
from python_tests.training import nets

GOLDENS = {1: 0.9829, 5: 1.4576, 35: 21.795, 45: 40.52, 60: 66.2562, 89: 80.0571, 90: 80.1496}


def asni(model: nn.Module, **options: object) -> pk.training.ASNI:
    made = pk.pruner("asni", model, **options)
    assert isinstance(made, pk.training.ASNI)
    return made


def test_schedule_has_the_printed_values() -> None:
    pruner = asni(nets.mlp(), alpha=81.04, beta=0.5, gamma=10, epochs=90)
    for epoch, percent in GOLDENS.items():
        assert pruner.percent(epoch) == pytest.approx(percent, abs=6e-5 if epoch != 35 else 6e-4)
        assert pruner.percent(epoch) == pytest.approx(
            oracle.asni_percent(epoch, 90, 81.04, 0.5, 10), rel=1e-12
        )


def test_last_update_stops_the_schedule() -> None:
    pruner = asni(nets.mlp(), alpha=50, epochs=10, last_update=4)
    assert pruner.percent(9) == pruner.percent(4)
    events = [pruner.on_epoch_end() for _ in range(6)]
    assert [event.pruned for event in events] == [True] * 4 + [False] * 2
    assert "since epoch 4" in events[-1].reason


@pytest.mark.filterwarnings("ignore:layer collapse, epoch")  # Adam's decay empties query and key
@pytest.mark.parametrize("optimizer", [nets.sgd, nets.adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", nets.NETS)
def test_every_epoch_keeps_the_largest_and_is_nested(name: str, optimizer: object) -> None:
    model = nets.make(name)
    opt = optimizer(model)  # type: ignore[operator]
    epochs, gamma = 20, 2.0
    pruner = asni(model, sparsity=0.9, epochs=epochs, gamma=gamma, optimizer=opt)
    alpha = 100 * 0.9 / (oracle.asni_percent(epochs, epochs, 1.0, 0.5, gamma))
    names = list(pruner.masks)
    before = dict(pruner.masks)
    for epoch in range(1, epochs + 1):
        nets.train_epoch(model, opt, name)
        pruner.masks.verify(model)
        held = dict(model.named_parameters())
        weights = {n: held[n].detach().clone() for n in names}
        event = pruner.on_epoch_end(model)
        percent = oracle.asni_percent(epoch, epochs, alpha, 0.5, gamma)
        kept = pruner.total - int(percent / 100 * pruner.total)
        if epoch == epochs:  # alpha comes from a division: the last count is the one asked for
            kept = pruner.total - int(0.9 * pruner.total)
        assert event.kept == kept
        expected = oracle.largest(weights, kept)
        for n in names:
            mask = pruner.masks[n]
            assert torch.equal(mask, expected[n])
            assert not (mask & ~before[n]).any()
            values = held[n].detach()
            assert not values[~mask].any()
            assert torch.equal(values[mask], weights[n][mask])
        before = dict(pruner.masks)
    assert event.kept == pruner.masks.kept == pruner.total - int(0.9 * pruner.total)


@pytest.mark.parametrize("optimizer", [nets.sgd, nets.adam], ids=["sgd", "adam"])
def test_optimizer_state_of_pruned_weights_is_zero_after_each_step(optimizer: object) -> None:
    model = nets.make("residual")
    opt = optimizer(model)  # type: ignore[operator]
    pruner = asni(model, sparsity=0.8, epochs=4, optimizer=opt)

    def look() -> None:
        held = dict(model.named_parameters())
        for n in pruner.masks:
            dead = ~pruner.masks[n]
            assert not held[n].detach()[dead].any()
            for value in opt.state[held[n]].values():
                if isinstance(value, torch.Tensor) and value.shape == held[n].shape:
                    assert not value[dead].any()

    for _ in range(4):
        nets.train_epoch(model, opt, "residual", after_step=look)
        pruner.on_epoch_end(model)
    assert pruner.masks.sparsity == pytest.approx(0.8, abs=0.01)


def test_ties_of_zeros_do_not_bring_pruned_weights_back() -> None:
    """All weights equal: the highest indices go, and what went stays away when others shrink."""
    layer = nn.Linear(10, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    pruner = asni(layer, alpha=90, gamma=1, epochs=4)
    assert [pruner.kept_at(e) for e in (1, 2, 3, 4)] == [8, 6, 4, 3]
    pruner.on_epoch_end()
    assert pruner.masks["weight"][0].tolist() == [True] * 8 + [False] * 2
    with torch.no_grad():
        layer.weight[0, :5] = 0.0  # five survivors die, so six of them and the pruned tie
        layer.weight[0, 9] = 7.0  # pruned, but written to from outside
    pruner.on_epoch_end()
    assert pruner.masks["weight"][0].tolist() == [True] * 3 + [False] * 2 + [True] * 3 + [False] * 2
    assert layer.weight[0, 9].item() == 0.0


def test_half_cosine() -> None:
    pruner = asni(nets.mlp(), alpha=50, epochs=90, delta=0.06)
    assert pruner.learning_rate_factor(0) == 1.0
    assert pruner.learning_rate_factor(90) == pytest.approx(0.0079, abs=5e-5)
    assert asni(nets.mlp(), alpha=50, epochs=90).learning_rate_factor(90) == pytest.approx(
        0.00095, abs=5e-6
    )


@pytest.mark.parametrize("name", nets.NETS)
def test_centroids_are_plain_means(name: str) -> None:
    model = nets.make(name)
    pruner = asni(model, sparsity=0.6, epochs=1)
    pruner.on_epoch_end()
    found = pruner.centroids()
    held = dict(model.named_parameters())
    for n, (above, below) in found.values.items():
        expected = oracle.means(held[n])
        assert above == pytest.approx(expected[0], rel=1e-12)
        assert below == pytest.approx(expected[1], rel=1e-12)


@pytest.mark.parametrize("name", nets.NETS)
def test_centroids_stored_and_restored(name: str, tmp_path: object) -> None:
    model = nets.make(name)
    opt = nets.adam(model)
    pruner = asni(model, sparsity=0.7, epochs=3, optimizer=opt)
    for _ in range(3):
        nets.train_epoch(model, opt, name)
        pruner.on_epoch_end(model)
    found = pruner.centroids()
    found.save(f"{tmp_path}/centroids.safetensors")
    fresh = nets.make(name, seed=5)
    embeddings = {n: p.detach().clone() for n, p in fresh.named_parameters() if "embeddings" in n}
    Centroids.load(f"{tmp_path}/centroids.safetensors").reinitialise(fresh)
    trained, now = dict(model.named_parameters()), dict(fresh.named_parameters())
    for n, (above, below) in found.values.items():
        old, new = trained[n].detach(), now[n].detach()
        assert torch.equal(new == 0, old == 0)
        assert torch.equal(new > 0, old > 0)
        assert {float(v) for v in new.unique()} <= {
            0.0,
            float(torch.tensor(above)),
            float(torch.tensor(below)),
        }
    for module_name, module in fresh.named_modules():
        if "Norm" in type(module).__name__:
            assert bool((module.weight == 1).all()), module_name
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any(), module_name
    for n, value in embeddings.items():
        if "Norm" not in n:
            assert torch.equal(now[n], value)
    assert sum(p.numel() > 0 for p in embeddings.values()) == len(embeddings)


@pytest.mark.filterwarnings("ignore:layer collapse", "ignore:.*left out. the embedding")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models(name: str) -> None:
    model = nets.causal(name)
    tokens, _ = nets.samples("bert")
    opt = torch.optim.Adam(model.parameters(), lr=5e-3)
    pruner = asni(model, sparsity=0.6, epochs=5, optimizer=opt, on_collapse="floor")
    losses = []
    for epoch in range(1, 6):
        for _ in range(4):
            opt.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert pruner.on_epoch_end(model).kept == pruner.kept_at(epoch)
        pruner.masks.verify(model)
    assert losses[-1] < losses[0]
    assert pruner.masks.kept == pruner.total - int(0.6 * pruner.total)
    fresh = nets.causal(name)
    pruner.centroids().reinitialise(fresh)
    pruner.masks.verify(fresh)
    assert torch.isfinite(fresh(input_ids=tokens, labels=tokens).loss)
    for module_name, module in fresh.named_modules():
        if "Norm" in type(module).__name__ or "ln_" in module_name:
            assert bool((module.weight == 1).all()), module_name


def test_centroids_of_one_sign_are_reported() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 0.0]])
    with pytest.warns(pk.errors.PaikernWarning, match="weight have survivors of one sign"):
        found = Centroids.of(layer, pk.MaskSet.from_model(layer))
    assert found.values == {"weight": (1.5, 0.0)}


def test_centroids_of_an_empty_layer_are_refused() -> None:
    layer = nn.Linear(3, 1, bias=False)
    masks = pk.MaskSet.from_bool({"weight": torch.zeros(1, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="weight keeps no weight"):
        Centroids.of(layer, masks)


def test_load_refuses_a_mask_file_without_centroids(tmp_path: object) -> None:
    pk.MaskSet.from_model(nets.mlp()).save(f"{tmp_path}/masks")
    with pytest.raises(pk.MaskFormatError, match="without centroids"):
        Centroids.load(f"{tmp_path}/masks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 100}, r"alpha must be in \(0, 100\)"),
        ({"alpha": 0}, r"alpha must be in \(0, 100\)"),
        ({"alpha": 50, "gamma": 0}, "gamma must be > 0, got 0"),
        ({"alpha": 50, "gamma": -1.0}, "gamma must be > 0"),
        ({"alpha": 50, "last_update": 6}, r"last_update must be in \[1, 5\], got 6"),
        ({"alpha": 50, "beta": 1.5}, "beta must be in"),
        ({"alpha": 50, "sparsity": 0.5}, "exactly one of sparsity and alpha"),
        ({}, "exactly one of sparsity and alpha"),
        ({"sparsity": 0.999}, "use a smaller gamma than 0.5, or more epochs"),
        ({"alpha": 99.99, "gamma": 0.05, "delta": -1}, "delta must be >= 0"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    model = nets.make("mlp")
    before = nets.copy_of(model)
    with pytest.raises(ValueError, match=message):
        asni(model, epochs=5, **options)
    assert nets.equal_states(before, nets.copy_of(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_epoch_changes_nothing(value: float) -> None:
    model = nets.make("mlp")
    opt = nets.sgd(model)
    pruner = asni(model, sparsity=0.8, epochs=4, optimizer=opt)
    nets.train_epoch(model, opt, "mlp")
    pruner.on_epoch_end(model)
    kept, masks = copy.copy(pruner.masks), pruner.masks.digest
    good = nets.copy_of(model)
    place = pruner.masks["3.weight"].nonzero()[0]
    with torch.no_grad():
        model[3].weight[tuple(place)] = value
    broken = nets.copy_of(model)
    with pytest.raises(pk.NonFiniteScoreError, match=r"epoch 2: 3\.weight holds 1 NaN or infinite"):
        pruner.on_epoch_end(model)
    assert pruner.masks.digest == masks
    assert pruner.epoch == 1
    for n, was in broken.items():
        assert torch.equal(model.state_dict()[n].isnan(), was.isnan())
    model.load_state_dict(good)
    assert pruner.on_epoch_end(model).epoch == 2
    assert pruner.masks.kept < kept.kept


def test_a_steep_sigmoid_does_not_overflow() -> None:
    pruner = asni(nets.make("mlp"), epochs=100, alpha=90.0, gamma=0.05)
    assert (pruner.percent(1), pruner.percent(100)) == (0.0, 90.0)
    with pytest.raises(pk.SparsityError, match=r"use a smaller gamma than 0.05"):
        asni(nets.make("mlp"), epochs=100, sparsity=0.5, gamma=0.05, last_update=1)


def test_centroids_keep_the_precision_of_the_model() -> None:
    net = nn.Linear(5, 4).double()
    found = Centroids.of(net, pk.MaskSet.from_model(net))
    found.reinitialise(net)
    above, below = found.values["weight"]
    assert set(net.weight.flatten().tolist()) == {above, below}


def test_reinitialised_biases_of_a_recurrent_layer_are_zero() -> None:
    net = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "out": nn.Linear(4, 2)})
    Centroids.of(net, pk.MaskSet.from_model(net)).reinitialise(net)
    biases = [p for name, p in net.named_parameters() if "bias" in name]
    assert len(biases) == 3
    assert not any(bool(bias.any()) for bias in biases)
