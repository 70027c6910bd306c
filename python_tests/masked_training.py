"""A small network, its masks, and training under them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paikern.masks import MaskSet
from paikern.prunable import prunable_parameters

STEPS = 30


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


def random_masks(model: nn.Module, density: float = 0.3) -> MaskSet:
    generator = torch.Generator().manual_seed(0)
    return MaskSet.from_bool(
        {
            n: torch.rand(p.shape, generator=generator) < density
            for n, p in prunable_parameters(model).items()
        }
    )


def batches(count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 2, 4, 4, generator=generator)
        yield x, (x.sum((1, 2, 3)) > 0).long()


def train(model: nn.Module, optimizer: Any, steps: int = STEPS) -> list[float]:
    losses = []
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_tensors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """The optimizer's tensors of the parameter's shape."""
    values = optimizer.state[parameter].values()
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape]


def assert_pruned(
    masks: MaskSet, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    masks.verify(model)
    parameters = dict(model.named_parameters())
    for name in masks:
        parameter = parameters[name]
        dead = ~masks[name]
        assert not parameter.detach()[dead].any()
        # training moved on: the kept weights are alive
        assert parameter.detach()[masks[name]].all()
        if optimizer is not None:
            for value in state_tensors(optimizer, parameter):
                assert not value[dead].any()
