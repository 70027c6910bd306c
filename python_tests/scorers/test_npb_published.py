"""The variant that follows the authors' program: its golden run, pieces, biases and fine-tuning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.analysis import shortcuts
from paikern.budget import layer_budget
from paikern.pathgraph import trace
from paikern.scorers.npb_program import LayerProgram, Solution
from python_tests.oracles import path_oracle
from python_tests.scorers.npb_nets import NETS


def prune(net: nn.Module, x: torch.Tensor, sparsity: float, **options: Any) -> pk.MaskSet:
    return pk.prune(
        net, "npb", sparsity=sparsity, example_inputs=x, variant="published", apply=False,
        progress=False, **options,
    )  # fmt: skip


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[LayerProgram]:
    """Every program that is solved."""
    seen: list[LayerProgram] = []
    solve = LayerProgram.solve

    def recorded(self: LayerProgram) -> Solution:
        seen.append(self)
        return solve(self)

    monkeypatch.setattr(LayerProgram, "solve", recorded)
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_golden_run_of_resnet20(seed: int, solved: list[LayerProgram]) -> None:
    """90 %, alpha .01, beta 1, 9 weights a kernel: 27 programs, 701 nodes, 27,109 weights."""
    net, x = pk.zoo.create("resnet20", seed=0), torch.ones(1, 3, 32, 32)
    masks = prune(net, x, 0.9, alpha=0.01, beta=1.0, max_kernel=9, seed=seed)
    top = pk.analyze(net, masks, example_inputs=x)
    assert len(solved) == 27
    assert masks.kept == 27_109
    assert top.input_nodes == 701
    assert top.log_paths == pytest.approx(74.33, abs=0.5)
    assert top.effective_params == masks.kept


def test_pieces_and_the_dense_rest(solved: list[LayerProgram]) -> None:
    """130 outputs of 130 inputs: 4 pieces of 32 and 2 outputs dense; a linear layer in tens."""
    net = nn.Sequential(
        nn.Conv2d(130, 130, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(130, 45)
    )
    x = torch.ones(1, 130, 8, 8)
    masks = prune(net, x, 0.9, scope="local", repair=False)
    conv, linear = (masks[f"{i}.weight"] for i in (0, 3))
    assert [p.outputs for p in solved] == [32] * 4 + [10] * 4
    assert bool(conv[128:].all())
    assert bool(linear[40:].all())
    budget = layer_budget({n: tuple(m.shape) for n, m in masks.items()}, 0.9, "local")
    for piece in conv[:128].split(32):
        assert int(piece.sum()) == -(-budget[0] * 32 // 130)
    for piece in linear[:40].split(10):
        assert int(piece.sum()) == -(-budget[1] * 10 // 45)
    assert not torch.equal(conv[:32], conv[32:64])
    paper = pk.prune(net, "npb", sparsity=0.9, example_inputs=x, scope="local", apply=False)
    assert paper.kept < masks.kept
    assert not paper["0.weight"][128:].all()


def test_pieces_by_score_keep_the_best_positions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(130, 130, 3))
    mask = prune(net, torch.ones(1, 130, 4, 4), 0.8, place="score", repair=False)["0.weight"]
    weight, kernels = net[0].weight.detach().flatten(2).abs(), mask.flatten(2)
    least = torch.where(kernels, weight, torch.inf).amin(2)
    assert bool((least >= torch.where(kernels, -torch.inf, weight).amax(2)).all())


def test_biases_begin_paths(solved: list[LayerProgram]) -> None:
    """Two inputs reach the second layer by 3 and 1 weights; its biases of 1 make that 4 and 2."""

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    net, x = Given(), torch.ones(1, 3)
    for seed in range(4):
        solved.clear()
        masks = prune(net, x, 0.3, scope="local", seed=seed, repair=False)
        counts = masks["first.weight"].sum(1) + 1.0
        torch.testing.assert_close(
            torch.from_numpy(solved[1].paths[0]), (counts / counts.max()).double()
        )


def test_small_budgets_take_all_paths_for_the_longest(solved: list[LayerProgram]) -> None:
    make, x = NETS["resnet20"]
    prune(make(), x, 0.9)
    assert all(program.published_longest for program in solved)
    small = [p for p in solved if int(p.budget[0]) < p.outputs * int(p.capacity[0])]
    for program in small:
        assert program.longest[0] > program.outputs * program.capacity[0] * program.paths.sum()


@pytest.mark.parametrize("name", ["mixed", "signals", "vit", "gpt2 conv1d"])
def test_other_networks(name: str) -> None:
    make, x = NETS[name]
    net = make()
    masks = prune(net, x, 0.8)
    assert masks == prune(net, x, 0.8)
    wanted = layer_budget({n: tuple(m.shape) for n, m in masks.items()}, 0.8, "erk", variant="npb")
    total = sum(wanted)
    assert total * 0.9 < masks.kept < masks.total * 0.5
    assert pk.analyze(net, masks, example_inputs=x).log_paths > 0


def test_fine_tuning_keeps_what_is_effective() -> None:
    make, x = NETS["resnet20"]
    net = make()
    before, after = (prune(net, x, 0.99, repair=repair) for repair in (False, True))
    old, new = (pk.analyze(net, m, example_inputs=x) for m in (before, after))
    assert new.effective_params > old.effective_params
    assert new.log_paths > old.log_paths
    convs = [layer for layer in new.layers if layer.kind == "conv2d"]
    assert sum(layer.effective_params for layer in convs) >= 0.98 * sum(
        layer.kept for layer in convs
    )


def test_node_constraint_rounds_its_caps_down(solved: list[LayerProgram]) -> None:
    make, x = NETS["resnet20"]
    prune(make(), x, 0.5, node_constraint=True, repair=False)
    program = solved[1]
    density = int(program.budget[0]) / (16 * 16 * 9)
    assert program.row_cap is not None
    assert program.column_cap is not None
    assert int(program.row_cap[0]) == int(program.column_cap[0]) == int(16 * 9 * density)


def test_input_nodes_and_shortcuts() -> None:
    net, x = pk.zoo.create("resnet20"), torch.ones(1, 3, 32, 32)
    assert shortcuts(trace(net, x)) == {
        "layer2.0.downsample.0.weight",
        "layer3.0.downsample.0.weight",
    }
    assert pk.analyze(net, example_inputs=x).input_nodes == 701
    bottlenecks = pk.zoo.create("resnet50", image_size=32)
    found = shortcuts(trace(bottlenecks, torch.ones(1, 3, 32, 32)))
    assert found == {f"layer{i}.0.downsample.0.weight" for i in (1, 2, 3, 4)}
    vit, y = NETS["vit"]
    assert not shortcuts(trace(vit(), y))


def test_input_nodes_of_a_masked_network() -> None:
    """By float64 autograd: live inputs of each layer and live outputs of the last."""
    make, x = NETS["mlp"]
    net = make()
    masks = pk.prune(net, "npb", sparsity=0.995, example_inputs=x, apply=False)
    flow = path_oracle(net, x, dict(masks), p_net=0)
    live = [(layer.weight > 0) & (layer.gradient > 0) for layer in flow.layers.values()]
    expected = sum(int(layer.any(0).sum()) for layer in live) + int(live[-1].any(1).sum())
    assert pk.analyze(net, masks, example_inputs=x).input_nodes == expected
