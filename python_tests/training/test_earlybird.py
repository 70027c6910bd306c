"""EarlyBird tickets: marks in a queue, distances, the penalty on gamma."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from python_tests.oracles import training as oracle
from python_tests.training import nets


def started(model: nn.Module, **options: Any) -> Any:
    given = {"sparsity": 0.5, "epochs": 12, "penalty": 0.0, "method": "magnitude", **options}
    return pk.pruner("earlybird_ticket", model, **given)


def scales(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def drifting(epochs: int, channels: int, noise: float, seed: int) -> list[list[float]]:
    """gamma whose noise fades from epoch to epoch."""
    generator = torch.Generator().manual_seed(seed)
    final = torch.randn(channels, generator=generator)
    return [
        (final + noise * 0.6**t * torch.randn(channels, generator=generator)).tolist()
        for t in range(epochs)
    ]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_the_ticket_comes_when_five_marks_agree(sparsity: float, seed: int) -> None:
    model = nets.make("residual")
    history = drifting(12, 16, 2.0, seed)
    pruner = started(model, sparsity=sparsity)
    found = None
    for epoch, gammas in enumerate(history, 1):
        with torch.no_grad():
            scales(model)[0].copy_(torch.tensor(gammas[:8]))
            scales(model)[1].copy_(torch.tensor(gammas[8:]))
        if pruner.on_epoch_end(model).pruned:
            found = epoch
            break
    assert found == oracle.ticket_epoch(history, int(sparsity * 16), 5, 0.1)
    assert found is None or found >= 5


def test_distances_are_fractions_of_the_channels() -> None:
    model = nets.make("residual")  # 16 channels, all gamma 1: the first 8 stay by index
    pruner = started(model, window=3)
    assert pruner.on_epoch_end(model).values == {}
    with torch.no_grad():
        scales(model)[0][:2] = 0.5  # channels 0 and 1 leave, 8 and 9 come
    assert pruner.on_epoch_end(model).values == {"distance": 4 / 16}
    with torch.no_grad():
        scales(model)[0][:2] = -1.0  # |gamma| counts
        scales(model)[0][2:5] = 0.5
    event = pruner.on_epoch_end(model)
    assert event.values == {"distance": 6 / 16}
    assert not event.pruned


@pytest.mark.parametrize("epochs", [3, 7])
def test_no_ticket_is_reported(epochs: int) -> None:
    model = nets.make("residual")
    pruner = started(model, epochs=epochs, tolerance=0.0)
    for epoch in range(epochs):
        with torch.no_grad():  # other channels every epoch
            for scale in scales(model):
                scale.copy_(torch.rand(8, generator=torch.Generator().manual_seed(epoch)))
        event = pruner.on_epoch_end(model)
    assert not event.pruned
    assert f"no ticket in {epochs} epochs" in event.reason
    assert ("5 are needed" in event.reason) == (epochs < 5)
    assert pruner.masks.sparsity == 0


def test_the_penalty_is_a_subgradient_until_the_ticket() -> None:
    model = nets.make("residual")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        scales(model)[0][0] = -1.0
        scales(model)[0][1] = 0.0
    before = [scale.detach().clone() for scale in scales(model)]
    pruner = started(model, optimizer=opt, penalty=1e-2, window=2)
    for scale in scales(model):
        scale.grad = torch.zeros_like(scale)
    opt.step()
    for scale, was in zip(scales(model), before, strict=True):
        assert torch.allclose(scale.detach(), was - 0.1 * 1e-2 * torch.sign(was), rtol=1e-6)
    pruner.on_epoch_end(model)
    assert pruner.on_epoch_end(model).pruned
    after = [scale.detach().clone() for scale in scales(model)]
    for scale in scales(model):
        scale.grad = torch.zeros_like(scale)
    opt.step()
    assert all(torch.equal(s.detach(), was) for s, was in zip(scales(model), after, strict=True))


def test_the_penalty_is_added_once_by_the_optimizer_that_holds_gamma() -> None:
    model = nets.make("residual")
    others = [model.stem.weight, model.conv.weight, *model.head.parameters()]
    opts = [
        torch.optim.SGD(others, lr=0.1),
        torch.optim.SGD([*model.norm1.parameters(), *model.norm2.parameters()], lr=0.1),
    ]
    started(model, optimizer=opts, penalty=1e-2)
    for scale in scales(model):
        scale.grad = torch.zeros_like(scale)
    opts[0].step()
    assert not any(scale.grad.any() for scale in scales(model) if scale.grad is not None)
    opts[1].step()
    for scale in scales(model):
        assert torch.allclose(scale.detach(), torch.full((8,), 1 - 0.1 * 1e-2), rtol=1e-6)


@pytest.mark.parametrize("cut", [2, 4, 6])
def test_going_on_from_a_state(cut: int) -> None:
    history = drifting(12, 16, 2.0, 0)

    def run(pruner: Any, model: nn.Module, start: int, stop: int) -> list[str]:
        reasons = []
        for gammas in history[start:stop]:
            with torch.no_grad():
                scales(model)[0].copy_(torch.tensor(gammas[:8]))
                scales(model)[1].copy_(torch.tensor(gammas[8:]))
            reasons.append(pruner.on_epoch_end(model).reason)
        return reasons

    model = nets.make("residual")
    whole = started(model)
    expected = run(whole, model, 0, 12)
    model = nets.make("residual")
    first = started(model)
    reasons = run(first, model, 0, cut)
    state, weights = first.state_dict(), model.state_dict()
    model = nets.make("residual")
    model.load_state_dict(weights)
    second = started(model)
    second.load_state_dict(state)
    assert reasons + run(second, model, cut, 12) == expected
    assert second.masks == whole.masks
    assert whole.pruned_at is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": -1.0}, "penalty must be >= 0, got -1.0"),
        ({"penalty": 1e-4}, "pass optimizer=, or penalty=0"),
        ({"window": 1}, "window must be >= 2, got 1"),
        ({"tolerance": 2.0}, r"tolerance must be in \[0, 1\], got 2.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        started(nets.make("residual"), **options)


def test_models_without_batch_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no batch norm with weights"):
        started(nets.make("mlp"))


def test_nan_names_the_epoch() -> None:
    model = nets.make("residual")
    pruner = started(model)
    with torch.no_grad():
        scales(model)[0][3] = float("nan")
    with pytest.raises(pk.NonFiniteScoreError, match="epoch 1: norm1 holds 1 NaN"):
        pruner.on_epoch_end(model)
    assert pruner._marks == []


def test_an_earlier_state_brings_the_penalty_back() -> None:
    model = nets.make("residual")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = started(model, penalty=1e-2, optimizer=opt)
    early = pruner.state_dict()
    while not pruner.on_epoch_end(model).pruned:
        pass
    pruner.load_state_dict(early)
    for scale in scales(model):
        torch.nn.init.ones_(scale)
        scale.grad = torch.zeros_like(scale)
    opt.step()
    for scale in scales(model):
        assert torch.allclose(scale.detach(), torch.full((8,), 1 - 0.1 * 1e-2), rtol=1e-6)
