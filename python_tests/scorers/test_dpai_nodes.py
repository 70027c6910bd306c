"""`keep_nodes` and `revive`: nodes that stay and nodes that come back."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern.errors import PaikernError, PaikernWarning
from paikern.pathgraph import Flow, Semantics, Visit
from paikern.prunable import prunable_parameters
from paikern.scorers.base import Run
from paikern.scorers.dpai_nodes import Revival
from paikern.scorers.dpai_trainer import DPaITrainer


def make_run(model: nn.Module, x: Tensor) -> Run:
    state = {name: p.detach() for name, p in [*model.named_parameters(), *model.named_buffers()]}
    return Run(model, state, prunable_parameters(model), x)


def dpai(model: nn.Module, x: Tensor, **options: object) -> pk.MaskSet:
    settings = {"sparsity": 0.98, "steps": 30, "apply": False, "progress": False} | options
    return pk.prune(model, "dpai", example_inputs=x, **settings)  # type: ignore[arg-type]


# --- keep_nodes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sparsity"),
    [
        ("lenet300", {}, 0.99),
        ("resnet20", {}, 0.98),
        ("resnet20", {}, 0.99),
        ("vgg16_bn", {"num_classes": 10}, 0.98),
    ],
)
@pytest.mark.parametrize("alpha", [0.0, 0.99])
def test_every_node_stays(
    name: str, options: dict[str, int], sparsity: float, alpha: float
) -> None:
    net = pk.zoo.create(name, seed=0, **options)
    x = pk.zoo.example_input(net)
    masks = dpai(net, x, sparsity=sparsity, alpha=alpha, keep_nodes=True, steps=15)
    dense = pk.analyze(net, example_inputs=x)
    found = pk.analyze(net, masks, example_inputs=x)
    assert found.effective_nodes == dense.effective_nodes
    assert found.effective_params == masks.kept == masks.total - math.floor(sparsity * masks.total)


def test_it_costs_few_paths_and_saves_nodes() -> None:
    net = pk.zoo.create("resnet20", seed=0)
    x = pk.zoo.example_input(net)
    free, held = (
        pk.analyze(net, dpai(net, x, alpha=0.0, keep_nodes=keep, steps=100), example_inputs=x)
        for keep in (False, True)
    )
    assert held.effective_nodes == 794 > 2 * free.effective_nodes
    assert held.log_paths > free.log_paths - 2.5


class Odd(nn.Module):
    """Groups, a transposed convolution, an even kernel, a 1d-like kernel and fused projections."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, (1, 3), padding=(0, 1), bias=False)
        self.b = nn.Conv2d(12, 20, 3, padding=1, groups=4, bias=False)
        self.c = nn.ConvTranspose2d(20, 8, 2, stride=2, groups=2, bias=False)
        self.d = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        self.e = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.c(self.b(self.a(x)))).flatten(2).transpose(1, 2)
        return self.e(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("seed", range(3))
def test_odd_layers_keep_their_nodes(seed: int) -> None:
    torch.manual_seed(seed)
    net, x = Odd(), torch.ones(1, 3, 4, 4)
    masks = dpai(net, x, sparsity=0.6, keep_nodes=True, seed=seed, alpha=0.5)
    dense = pk.analyze(net, example_inputs=x)
    found = pk.analyze(net, masks, example_inputs=x)
    assert found.effective_nodes == dense.effective_nodes
    assert found.effective_params == masks.kept


def test_too_small_a_budget_is_told() -> None:
    net = pk.zoo.create("lenet300", seed=0)
    with pytest.warns(PaikernWarning, match="keep_nodes: layers.1.weight, .* fewer weights"):
        masks = dpai(net, torch.ones(1, 784), sparsity=0.999, keep_nodes=True, steps=3)
    assert masks.kept == 267


def test_same_seed_same_mask_and_another_seed_another() -> None:
    net, x = pk.zoo.create("lenet300", seed=0), torch.ones(1, 784)
    first, again, other = (dpai(net, x, keep_nodes=True, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_model_and_the_given_scores_are_left_alone() -> None:
    net, x = pk.zoo.create("lenet300", seed=0), torch.ones(1, 784)
    given = {n: torch.randn(p.shape) for n, p in net.named_parameters() if p.dim() > 1}
    before = {n: t.clone() for n, t in given.items()}
    masks = dpai(net, x, keep_nodes=True, init_scores=given)
    assert all(torch.equal(given[n], before[n]) for n in given)
    assert masks.metadata["arguments"]["keep_nodes"] is True


# --- revive ---------------------------------------------------------------------------------------


def trained(net: nn.Module, x: Tensor, steps: int, **options: object) -> pk.analysis.Topology:
    return pk.analyze(net, dpai(net, x, steps=steps, **options), example_inputs=x)


def test_without_dead_nodes_nothing_changes() -> None:
    net, x = pk.zoo.create("lenet300", seed=0), torch.ones(1, 784)
    plain = dpai(net, x, sparsity=0.5, steps=8)
    assert pk.analyze(net, plain, example_inputs=x).effective_nodes == 410
    assert dpai(net, x, sparsity=0.5, steps=8, revive=True) == plain


def test_a_dead_node_gets_a_gradient_on_both_sides() -> None:
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    scores = {"0.weight": torch.full((4, 3), 2.0), "1.weight": torch.full((2, 4), 2.0)}
    scores["0.weight"][3] = scores["1.weight"][:, 3] = 1.0  # unit 3 is dead on both sides
    run = make_run(net, torch.ones(1, 3))
    moved = {}
    for revive in (False, True):
        settings = pk.scorers.DPaI(steps=1, alpha=0.5, init_scores=scores, revive=revive)
        trainer = DPaITrainer(run, settings.resolved("paper"), [9, 6])
        found = trainer.step()
        assert (found.nodes, found.params) == (5, 15)
        moved[revive] = {n: s - scores[n] for n, s in trainer.s.items()}
    assert torch.equal(moved[False]["0.weight"][3], torch.zeros(3))
    assert torch.equal(moved[False]["1.weight"][:, 3], torch.zeros(2))
    assert bool((moved[True]["0.weight"][3] > 0).all())
    assert bool((moved[True]["1.weight"][:, 3] > 0).all())
    for name, live in (("0.weight", slice(0, 3)), ("1.weight", (slice(None), slice(0, 3)))):
        assert torch.equal(moved[True][name][live], moved[False][name][live])


def test_borrowed_maps_only_fill_what_is_dead() -> None:
    net = pk.zoo.create("resnet20", seed=0)
    x = pk.zoo.example_input(net)
    masks = dpai(net, x, sparsity=0.99, alpha=0.0, steps=40)
    run = make_run(net, x)
    revival = Revival(run)
    flow = Flow(run.graph, Semantics(power=0))
    flow.forward(run.state, {name: masks.packed(name) for name in masks})
    filled = 0

    def visit(v: Visit) -> None:
        nonlocal filled
        for own, borrowed in zip((v.x, v.g), revival.borrow(v), strict=True):
            unit = own.dim() - 1 if v.step.kind == "linear" else 1
            others = [d for d in range(own.dim()) if d != unit]
            live = own.sum(others) > 0
            assert torch.equal(borrowed.movedim(unit, 0)[live], own.movedim(unit, 0)[live])
            assert bool((borrowed.sum(others) > 0).all())
            filled += int((~live).sum())

    flow.backward(visit)
    assert filled > 100


@pytest.mark.parametrize("seed", [2, 5])
def test_a_network_without_paths_comes_back(seed: int) -> None:
    net, x = pk.zoo.create("mlp", sizes=(10, 12, 12, 8), seed=0), torch.ones(1, 10)
    options = {"sparsity": 0.95, "alpha": 0.5, "seed": seed, "steps": 60}
    with pytest.raises(PaikernError, match="dead network at step 1"):
        dpai(net, x, **options)
    masks = dpai(net, x, revive=True, **options)
    assert masks.kept == 18
    assert pk.analyze(net, masks, example_inputs=x).effective_nodes > 5
    assert "log_paths" not in masks.metadata["history"][0]
    assert masks.metadata["history"][-1]["log_paths"] > 0


def test_reviving_in_vain_is_an_error() -> None:
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))
    scores = {"0.weight": torch.full((6, 4), 1.0), "1.weight": torch.full((3, 6), 1.0)}
    scores["0.weight"][:2] = 1e6  # units 0, 1 have inputs and units 4, 5 outputs, for good
    scores["1.weight"][:, 4:] = 1e6
    with pytest.raises(PaikernError, match="dead network at step 31"):
        dpai(net, torch.ones(1, 4), revive=True, sparsity=0.7, scope="local", init_scores=scores)


def test_fused_projections_and_shared_layers_are_revived() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
            self.twice = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.twice(self.attention(x, x, x, need_weights=False)[0]))

    torch.manual_seed(0)
    net, x = Shared(), torch.ones(1, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PaikernWarning)
        masks = dpai(net, x, sparsity=0.9, revive=True)
    assert masks.kept == masks.total - math.floor(0.9 * masks.total)


@pytest.mark.parametrize("name", ["keep_nodes", "revive"])
def test_switches_are_booleans(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        pk.scorers.DPaI(**{name: "no"})
