"""Training one network of the quality study, with masks held or with a pruner that is told.

Everything is trained alike: 4,000 MNIST images, SGD with momentum, one cycle of the learning rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.comparison_cases import prepared
from bench.mnist import Split, load
from bench.quality_ways import COUNTED, NETS, PARTS, SAMPLES_PER_CLASS, Net

#: Steps that are timed where a model is not trained in the form that is asked about.
TIMED_STEPS = 9


class Trained(NamedTuple):
    """A model after its training."""

    model: nn.Module
    accuracy: float
    seconds: float
    step_ms: float
    """The median of the training steps."""


@cache
def data(net: str) -> Split:
    """The images in the shape that the network takes."""
    split = load(NETS[net].image_size)
    if NETS[net].zoo == "lenet300":
        return split._replace(train_x=split.train_x.flatten(1), test_x=split.test_x.flatten(1))
    # A step of ResNet-20 takes 107 ms in this layout and 128 ms in the default one.
    layout = torch.channels_last
    return split._replace(
        train_x=split.train_x.contiguous(memory_format=layout),
        test_x=split.test_x.contiguous(memory_format=layout),
    )


def samples(net: str, batches: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of the first training images, the same number of each digit in every one."""
    split = data(net)
    found = []
    for batch in range(batches):
        rows = slice(batch * SAMPLES_PER_CLASS, (batch + 1) * SAMPLES_PER_CLASS)
        index = torch.cat([(split.train_y == digit).nonzero()[rows, 0] for digit in range(10)])
        found.append((split.train_x[index].contiguous(), split.train_y[index]))
    return found


def model_of(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """The network at its initial weights, and one input of ones."""
    from paikern import zoo

    if name in COUNTED:
        subject = prepared(name)
        return subject.model, torch.ones_like(subject.example)
    net = NETS[name]
    model = zoo.create(net.zoo, seed=seed, **net.options)
    size = net.image_size
    shape = (1, size * size) if net.zoo == "lenet300" else (1, 1, size, size)
    return model, torch.ones(shape)


class Run:
    """The training of one model: optimizer, schedule and the order of the images."""

    def __init__(self, name: str, model: nn.Module, seed: int, epochs: int | None) -> None:
        net = NETS[name]
        self.net: Net = net
        self.split = data(name)
        if net.zoo != "lenet300":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model, self.seed = model, seed
        self.epochs = net.epochs if epochs is None else epochs
        self.batches = len(self.split.train_y) // net.batch
        self.total = max(1, self.epochs * self.batches)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=net.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, net.learning_rate, total_steps=self.total
        )
        self.step_times: list[float] = []

    def once(self, told: Callable[[], bool] = lambda: False) -> bool:
        """Train all epochs; `told` is called `PARTS` times on the way.

        Ends early, with True, where `told` says that training starts over.
        """
        generator = torch.Generator().manual_seed(self.seed)
        steps = 0
        self.model.train()
        for _ in range(self.epochs):
            order = torch.randperm(len(self.split.train_y), generator=generator)
            for index in order.split(self.net.batch)[: self.batches]:
                start = time.perf_counter()
                step(self.model, self.split.train_x[index], self.split.train_y[index])
                self.optimizer.step()
                self.step_times.append(time.perf_counter() - start)
                self.schedule.step()
                self.optimizer.zero_grad()
                steps += 1
                parts = steps * PARTS // self.total - (steps - 1) * PARTS // self.total
                if any(told() for _ in range(parts)):
                    return True
        return False

    def result(self, seconds: float) -> Trained:
        step_ms = 1000 * statistics.median(self.step_times)
        return Trained(self.model, accuracy(self.model, self.split), seconds, step_ms)


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(model(x), y).backward()


def trained(name: str, model: nn.Module, masks: Any, seed: int, epochs: int | None) -> Trained:
    """Train with `masks` held, or without any."""
    run = Run(name, model, seed, epochs)
    if masks is not None:
        masks.apply(run.model)
        masks.attach(run.model, run.optimizer)
    start = time.perf_counter()
    run.once()
    seconds = time.perf_counter() - start
    if masks is not None:
        masks.verify(run.model)
    return run.result(seconds)


def trained_with(
    name: str,
    model: nn.Module,
    seed: int,
    epochs: int | None,
    make: Callable[[nn.Module, Any, Any], Any],
) -> tuple[Trained, Any, float]:
    """Train with the pruner that `make(model, optimizer, schedule)` gives.

    Returns what was trained, the pruner, and the seconds that it took for itself.
    """
    run = Run(name, model, seed, epochs)
    pruner = make(run.model, run.optimizer, run.schedule)
    spent = 0.0

    def told() -> bool:
        nonlocal spent
        start = time.perf_counter()
        event = pruner.on_epoch_end(run.model)
        spent += time.perf_counter() - start
        return bool(event.rewound)

    start = time.perf_counter()
    while run.once(told):
        pass
    seconds = time.perf_counter() - start - spent
    pruner.masks.verify(run.model)
    return run.result(seconds), pruner, spent


def step_ms(name: str, model: nn.Module) -> float:
    """The median time of a training step on a batch, without the optimizer's part."""
    split, batch = data(name), NETS[name].batch
    model.train()
    times = []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        step(model, split.train_x[:batch], split.train_y[:batch])
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def accuracy(model: nn.Module, split: Split) -> float:
    """The share of the test images that is labelled rightly."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in split.test_x.split(500)])
    return float((found == split.test_y).float().mean())
