"""Pruned weights stay exactly zero while a model trains."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from paikern import zoo
from paikern.errors import MaskFormatError
from python_tests.masked_training import (
    STEPS,
    assert_pruned,
    batches,
    random_masks,
    small_net,
    state_tensors,
    train,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "momentum-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "momentum-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


# --- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_invariance(name: str) -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    keys = list(model.state_dict())
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks.attach(model, optimizer)
    train(model, optimizer)
    assert_pruned(masks, model, optimizer)
    assert list(model.state_dict()) == keys
    assert any(not torch.equal(start[n][masks[n]], model.get_parameter(n)[masks[n]]) for n in masks)


def test_same_as_masking_the_weight_in_the_forward() -> None:
    """SGD on a masked model equals SGD through ``weight * mask``, which is what papers do."""
    model = small_net()
    masks = random_masks(model)

    class Times(nn.Module):
        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.register_buffer("mask", mask.float())

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.mask

    other = copy.deepcopy(model)
    for name in masks:
        layer = other.get_submodule(name.rpartition(".")[0])
        parametrize.register_parametrization(layer, "weight", Times(masks[name]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    losses = train(model, optimizer)
    expected = train(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]


def test_state_from_before_attach_is_masked() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 3)
    weight = model.get_parameter("4.weight")
    kept = optimizer.state[weight]["exp_avg"].clone()
    masks.attach(model, optimizer)
    for name in masks:
        for value in state_tensors(optimizer, model.get_parameter(name)):
            assert not value[~masks[name]].any()
    after = optimizer.state[weight]["exp_avg"]
    assert torch.equal(after[masks["4.weight"]], kept[masks["4.weight"]])
    assert optimizer.state[weight]["step"] == 3


def test_attach_does_not_initialise_the_state() -> None:
    model = small_net()
    optimizer = torch.optim.Adam(model.parameters())
    random_masks(model).attach(model, optimizer)
    assert not optimizer.state


def test_gradients_stay_dense() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks.attach(model, optimizer)
    train(model, optimizer, 1)
    gradient = model.get_parameter("4.weight").grad
    assert gradient[~masks["4.weight"]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = small_net().to(dtype)
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    masks.attach(model, optimizer)
    for x, y in batches(10):
        optimizer.zero_grad()
        functional.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
    masks.verify(model)


def test_autocast() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    for x, y in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert_pruned(masks, model, optimizer)


def test_grad_scaler_with_skipped_steps() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(functional.cross_entropy(model(x), y)).backward()
        if step % 3 == 0:
            model.get_parameter("4.weight").grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert_pruned(masks, model, optimizer)


def test_gradient_accumulation_and_clipping() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    masks.attach(model, optimizer)
    for step, (x, y) in enumerate(batches(), 1):
        (functional.cross_entropy(model(x), y) / 4).backward()
        if step % 4 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            assert_pruned(masks, model, optimizer)


def test_closure_and_scheduler() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert_pruned(masks, model, optimizer)


def test_several_parameter_groups_and_frozen_layers() -> None:
    model = small_net()
    masks = random_masks(model)
    model.get_parameter("0.weight").requires_grad_(False)
    groups = [{"params": model[4].parameters(), "lr": 0.1}, {"params": model[6].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    masks.attach(model, optimizer)
    train(model, optimizer)
    assert_pruned(masks, model, optimizer)


def test_two_optimizers() -> None:
    model = small_net()
    masks = random_masks(model)
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model[4:].parameters(), lr=0.01)
    handles = [masks.attach(model, first), masks.attach(model, second)]
    for x, y in batches(5):
        functional.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
    assert_pruned(masks, model)
    for handle in handles:
        handle.remove()


# --- the handle ----------------------------------------------------------------------------------


def test_remove_ends_it() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hooks = dict(vars(model))
    handle = masks.attach(model, optimizer)
    assert handle.active
    handle.remove()
    handle.remove()
    assert not handle.active
    assert not model._load_state_dict_post_hooks
    assert set(vars(model)) == set(hooks)
    train(model, optimizer, 2)
    with pytest.raises(Exception, match="pruned weights that are not 0"):
        masks.verify(model)


def test_context_manager() -> None:
    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with masks.attach(model, optimizer) as handle:
        assert handle.active
        train(model, optimizer, 2)
        masks.verify(model)
    assert not handle.active
    assert not optimizer._optimizer_step_post_hooks


def test_attachment_does_not_keep_the_model_alive() -> None:
    model = small_net()
    alive = weakref.ref(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random_masks(model).attach(model, optimizer)
    del model, optimizer
    gc.collect()
    assert alive() is None


def test_lbfgs_is_refused() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="attach: LBFGS evaluates the model inside one step"):
        random_masks(model).attach(model, torch.optim.LBFGS(model.parameters()))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_optimizer_of_another_model_is_refused() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(small_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer holds none of the masked parameters"):
        random_masks(model).attach(model, optimizer)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("optimizer", [None, "sgd", nn.Linear(1, 1)])
def test_no_optimizer(optimizer: object) -> None:
    model = small_net()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got"):
        random_masks(model).attach(model, optimizer)


def test_masks_of_another_model_are_refused() -> None:
    masks = random_masks(small_net())
    model = zoo.create("mlp", sizes=(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(MaskFormatError, match="belong to another model"):
        masks.attach(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper:
        """As Accelerate and Lightning do it."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = small_net()
    masks = random_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, Wrapper(optimizer))
    train(model, optimizer, 3)
    assert_pruned(masks, model, optimizer)
