"""The reference of PHEW: the same distribution as ours, the same rules, the time limit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import paikern as pk
from bench.references import phew as reference
from paikern import ops
from paikern.pathgraph import trace
from paikern.pathgraph.units import walk_graph
from paikern.pathgraph.walks import flattened
from python_tests.pathgraph.helpers import state_of

WALKS = 6000


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, (1, 3), padding=(0, 1))
        self.downsample = nn.Sequential(nn.Conv2d(width, out, 1)) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x).relu())
        return y + (x if self.downsample is None else self.downsample(x))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), Block(4, 4), Block(4, 6), nn.Flatten(), nn.Linear(54, 3)
    )


def counted_by_reference(net: nn.Module) -> dict[str, Tensor]:
    """How often `WALKS` walks of the reference pass each weight."""
    np.random.seed(2)
    random.seed(2)
    stages = reference.stages_of(net)
    layers = [layer for stage in stages for branch in stage for layer in branch]
    for layer in layers:
        layer.prepare(lambda: None)
    counts = {layer.name: torch.zeros(layer.shape) for layer in layers}
    for number in range(WALKS):
        units = 2 if number % 2 == 0 else 3
        reference.walk(stages, number // 2 % units, forwards=number % 2 == 0)
        for layer in layers:
            counts[layer.name] += torch.from_numpy(layer.mask).view(layer.shape)
            layer.mask[:] = False
    return counts


def counted_by_ours(net: nn.Module, walks: int) -> dict[str, Tensor]:
    state = state_of(net)
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters() if p.dim() > 1}
    w = flattened(walk_graph(trace(net, torch.ones(1, 2, 3, 3)), state), state, shapes)
    tables = ops.phew_tables(w.weights, w.geometry, w.table_size)
    passed = ops.phew_walks(
        w.weights, tables, w.geometry, w.graph, seed=1, first=0, count=walks, width=w.width
    )
    counts = torch.bincount(passed[passed >= 0], minlength=8 * w.nbytes).float()
    return {
        name: counts[8 * first : 8 * first + torch.Size(shapes[name]).numel()].view(shapes[name])
        for name, (first, _) in w.parts.items()
    }


def test_both_pass_every_weight_as_often() -> None:
    net = network()
    theirs, ours = counted_by_reference(net), counted_by_ours(net, 20 * WALKS)
    assert set(theirs) == set(ours)
    for name, found in theirs.items():
        table = torch.stack([found.flatten(), ours[name].flatten()]).numpy()
        table = table[:, table.sum(0) > 0]
        common = table.sum(0) > 100
        table = np.concatenate([table[:, common], table[:, ~common].sum(1, keepdims=True)], 1)
        table = table[:, table.sum(0) > 0]
        assert stats.chi2_contingency(table).pvalue > 1e-4, name


def test_both_need_as_many_walks_for_a_resnet20() -> None:
    net = pk.zoo.create("resnet20", seed=0)
    walks: list[int] = []
    masks = reference.phew(net, 0.98, report=lambda kept, target: walks.append(kept))
    ours = pk.prune(
        net, "phew", sparsity=0.98, example_inputs=torch.ones(1, 3, 32, 32), exact=False,
        apply=False,
    )  # fmt: skip
    assert set(masks) == set(ours)
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == walks[-1]
    assert 5418 <= kept < 5418 + 20
    assert ours.metadata["history"][-1]["walks"] == pytest.approx(len(walks), rel=0.1)
    for name, mask in masks.items():
        share = int(mask.sum()) / kept
        assert ours.kept_by_layer[name] / ours.kept == pytest.approx(share, abs=0.02), name


def test_every_kept_weight_lies_on_a_path() -> None:
    net = pk.zoo.create("mlp", sizes=(10, 30, 20, 5), seed=0)
    masks = reference.phew(net, 0.9)
    top = pk.analyze(net, pk.MaskSet.from_bool(masks), example_inputs=torch.ones(1, 10))
    assert top.effective_params == sum(int(mask.sum()) for mask in masks.values())


def test_same_seed_same_mask() -> None:
    net = network()
    first, again, other = (reference.phew(net, 0.8, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_time_limit_ends_it() -> None:
    net = pk.zoo.create("mlp", sizes=(300, 400, 10), seed=0)
    with pytest.raises(
        reference.NotFinishedError, match=r"not finished in 0 s: 0 of 24800 weights"
    ):
        reference.phew(net, 0.8, time_limit=0.05)


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight is a grouped convolution"):
        reference.stages_of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))
