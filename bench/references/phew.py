"""PHEW as it is commonly run: one walk after the other in Python, units drawn by numpy.

    n[o, i] = sum |W[o, i]|                       kernel norm; |w| of a linear layer
    forwards   P(o | i) = n[o, i] / sum_o' n[o', i]
    backwards  P(i | o) = n[o, i] / sum_i' n[o, i']
    element    |W[o, i, u, v]| / n[o, i]          drawn within the kernel

Walks 0, 2, 4, ... start at an input unit, walks 1, 3, 5, ... at an output unit, both in turn; every
walk keeps the weights that it passes, and after each the masks of all layers are added up to see
whether enough are kept. Transition probabilities are computed element by element before the first
walk, each from a sum over its row or column. That is what makes it slow, and what programs do.

Branches are those of the network, read from the modules of the networks covered here: chains
(MLPs, VGG) and residual networks of basic or bottleneck blocks. Where a block has a convolution in
its shortcut, a walk takes either branch with probability 1/2; identity shortcuts are not walked.

Source: specification of PHEW, sections 1 to 3.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from bench.references.layers import NotFinishedError, prunable_layers
from bench.references.selection import Masks


@dataclass
class Layer:
    """One weight `[O, I, kernel elements]`, its transition probabilities and its mask."""

    name: str
    weight: np.ndarray
    shape: tuple[int, ...]
    forwards: np.ndarray = field(init=False)  # [O, I], columns add up to 1
    backwards: np.ndarray = field(init=False)  # [O, I], rows add up to 1
    mask: np.ndarray = field(init=False)

    def prepare(self, check: Callable[[], None]) -> None:
        """Fill the probabilities, one element after the other."""
        norms = np.abs(self.weight).sum(2)
        outputs, inputs = norms.shape
        self.mask = np.zeros(self.weight.shape, dtype=bool)
        self.forwards, self.backwards = np.empty_like(norms), np.empty_like(norms)
        for o in range(outputs):
            check()
            for i in range(inputs):
                column, row = norms[:, i].sum(), norms[o].sum()
                self.forwards[o, i] = norms[o, i] / column if column > 0 else 1 / outputs
                self.backwards[o, i] = norms[o, i] / row if row > 0 else 1 / inputs

    def step(self, unit: int, forwards: bool) -> int:
        """Draw the unit on the other side and an element of the kernel, and keep that."""
        chances = self.forwards[:, unit] if forwards else self.backwards[unit]
        drawn = int(np.random.choice(len(chances), p=chances / chances.sum()))
        o, i = (drawn, unit) if forwards else (unit, drawn)
        kernel = np.abs(self.weight[o, i])
        norm = kernel.sum()
        count = len(kernel)
        chance = kernel / norm if norm > 0 else np.full(count, 1 / count)
        at = int(np.random.choice(count, p=chance)) if count > 1 else 0
        self.mask[o, i, at] = True
        return drawn


# A network is a list of stages; a stage is its branches, each a list of layers in order.
Stage = list[list[Layer]]


def stages_of(model: nn.Module) -> list[Stage]:
    """The layers of a chain or a residual network, branch by branch.

    A module is a residual block if it has convolutions `conv1`, `conv2` (and `conv3`), as in
    torchvision; a `downsample` or `shortcut` that holds a convolution is its second branch.

    Raises:
        ValueError: a grouped convolution, for which the rule above is not defined.
    """
    layers = prunable_layers(model)
    names = {id(layer): name for name, layer in layers.items()}

    def made(layer: nn.Module) -> Layer:
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"stages_of: {names[id(layer)]} is a grouped convolution")
        weight = layer.weight.detach().double().numpy()
        flat = weight.reshape(*weight.shape[:2], -1)
        return Layer(names[id(layer)], flat, weight.shape)

    stages: list[Stage] = []

    def visit(module: nn.Module) -> None:
        if id(module) in names:
            stages.append([[made(module)]])
            return
        convs = [getattr(module, f"conv{i}", None) for i in (1, 2, 3)]
        if convs[0] is None or convs[1] is None:
            for child in module.children():
                visit(child)
            return
        stage = [[made(conv) for conv in convs if conv is not None]]
        beside = getattr(module, "downsample", None) or getattr(module, "shortcut", None)
        if beside is not None:
            stage += [[made(part)] for part in beside.modules() if id(part) in names]
        stages.append(stage)

    visit(model)
    return stages


def phew(
    model: nn.Module,
    sparsity: float,
    *,
    seed: int = 0,
    report: Callable[[int, int], object] | None = None,
    time_limit: float | None = None,
) -> Masks:
    """Return name -> bool mask of `model`, which is left untouched.

    At least `N - floor(sparsity * N)` weights are kept: the walk that reaches the budget is kept as
    a whole. `seed` is that of numpy and of Python, which draws the branches and the positions of a
    flattened map. `report` is called with the weights kept and the budget after every walk.

    Raises:
        NotFinishedError: `time_limit` seconds passed.
        ValueError: a network that `stages_of` does not cover.
    """
    np.random.seed(seed)
    random.seed(seed)
    started = time.perf_counter()
    stages = stages_of(model)
    layers = [layer for stage in stages for branch in stage for layer in branch]
    total = sum(layer.weight.size for layer in layers)
    target = total - int(sparsity * total)
    kept = 0

    def check() -> None:
        passed = time.perf_counter() - started
        if time_limit is not None and passed > time_limit:
            raise NotFinishedError(
                f"not finished in {time_limit:.0f} s: {kept} of {target} weights kept"
            )

    for layer in layers:
        layer.prepare(check)
    inputs, outputs = stages[0][0][0].weight.shape[1], stages[-1][0][-1].weight.shape[0]
    number = 0
    while kept < target:
        check()
        turn = number // 2
        if number % 2 == 0:
            walk(stages, turn % inputs, forwards=True)
        else:
            walk(stages, turn % outputs, forwards=False)
        number += 1
        kept = sum(int(layer.mask.sum()) for layer in layers)
        if report is not None:
            report(kept, target)
    return {layer.name: torch.from_numpy(layer.mask.reshape(layer.shape)) for layer in layers}


def walk(stages: list[Stage], unit: int, *, forwards: bool) -> None:
    """One walk through all stages; the masks of the layers passed are written."""
    width = None  # of the units at hand, going backwards from a linear layer
    for stage in stages if forwards else stages[::-1]:
        branch = stage[random.randrange(len(stage))]
        for layer in branch if forwards else branch[::-1]:
            outputs, inputs = layer.weight.shape[:2]
            if forwards:
                if width is not None and inputs != width:  # positions of a flattened map
                    positions = inputs // width
                    unit = unit * positions + random.randrange(positions)
                width = outputs
            else:
                if width is not None and outputs != width:
                    unit //= width // outputs
                width = inputs
            unit = layer.step(unit, forwards)
