"""`untouched`: a model can be run in any mode and nothing of it shows, also after an error."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from paikern.gradients import untouched
from python_tests.small_runs import Untouched, net

X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(4))


class Stateful(nn.Module):
    """Replaces its buffer, keeps what it has seen, and draws from three generators."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.last = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.last, self.seen = x[0], x
        return x * random.random() * np.random.rand() * torch.rand(())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nothing_shows_afterwards(mode: str) -> None:
    model = net()
    guard = Untouched(model)
    model.norm.eval()  # modules of different modes
    guard.before = guard.look()
    with untouched(model, mode, seed=3):
        assert all(m.training == (mode == "train") for m in model.modules())
        model(X)
        changed = bool((model.norm.running_mean != 0).any())
        assert changed == (mode == "train")
    guard.check()


def test_nothing_shows_after_an_error() -> None:
    model = net()
    guard = Untouched(model)
    with pytest.raises(RuntimeError), untouched(model, "train", seed=3):
        model.stem(model.norm(model.stem(X)))
    guard.check()


def test_states_that_a_model_replaces() -> None:
    model = Stateful()
    count, last, states = model.count, model.last, (random.getstate(), np.random.get_state()[1][:])
    with untouched(model, "train", seed=3):
        model(X)
        model(X)
        assert int(model.count) == 2
    assert model.count is count
    assert model.last is last
    assert int(count) == 0
    assert not hasattr(model, "seen")
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_one_seed_gives_one_result() -> None:
    model, values = Stateful(), []
    for seed in (3, 3, 4):
        torch.rand(5)
        with untouched(model, "train", seed):
            values.append(model(X))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_buffers_that_are_shared_stay_shared_inside() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    model[1].running_mean = model[0].running_mean
    with untouched(model, "train", seed=0):
        model[0](torch.ones(4, 2))
        assert model[1].running_mean is model[0].running_mean
        assert bool((model[1].running_mean != 0).all())
    assert model[1].running_mean is model[0].running_mean
    assert bool((model[0].running_mean == 0).all())


def test_weight_of_a_pruning_hook_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    torch_prune.l1_unstructured(model[0], "weight", amount=4)
    before = model[0].weight
    with untouched(model, "eval", seed=0):
        model(torch.ones(1, 3))
        assert model[0].weight is not before
    assert model[0].weight is before


def test_gradients_are_on_in_inference_mode_and_it_goes_on_afterwards() -> None:
    model = nn.Linear(2, 2)
    with torch.inference_mode():
        with untouched(model, "eval", seed=0):
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()


def test_a_mode_that_does_not_exist() -> None:
    expected = pytest.raises(ValueError, match=r"mode must be one of .*, got 'test'")
    with expected, untouched(nn.Linear(1, 1), "test", 0):
        pass
