"""NPB on networks: budgets, incoming paths, determinism, placement, options and errors."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern.budget import layer_budget
from paikern.errors import NonFiniteScoreError, PaikernError, PaikernWarning, SparsityError
from paikern.pathgraph import trace
from paikern.scorers import npb
from paikern.scorers.npb_graph import sum_pools
from paikern.scorers.npb_program import LayerProgram
from python_tests.oracles import path_oracle
from python_tests.scorers.npb_milp import highs, value_of
from python_tests.scorers.npb_nets import NETS


def prune(model: nn.Module, x: Tensor, sparsity: float, **options: Any) -> pk.MaskSet:
    return pk.prune(
        model, "npb", sparsity=sparsity, example_inputs=x, apply=False, progress=False, **options
    )


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_budgets_are_exact(name: str, sparsity: float) -> None:
    make, x = NETS[name]
    net = make()
    plain = prune(net, x, sparsity, repair=False)
    shapes = {n: tuple(m.shape) for n, m in plain.items()}
    kept = layer_budget(shapes, sparsity, "erk")
    assert list(plain.kept_by_layer.values()) == kept
    repaired = prune(net, x, sparsity)
    assert repaired.kept == sum(kept) == repaired.total - math.floor(sparsity * repaired.total)
    assert list(repaired) == list(plain)
    local = prune(net, x, sparsity, scope="local", repair=False)
    assert list(local.kept_by_layer.values()) == layer_budget(shapes, sparsity, "local")


@pytest.mark.parametrize("name", NETS)
def test_every_layer_is_optimal_for_its_incoming_paths(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P_in is that of a float64 run of the masked network, and the program is solved for it."""
    make, x = NETS[name]
    net = make()
    seen: dict[str, np.ndarray] = {}
    incoming = npb.incoming

    def recorded(step: Any, *rest: Any) -> np.ndarray:
        seen[step.parameter] = incoming(step, *rest)
        return seen[step.parameter]

    monkeypatch.setattr(npb, "incoming", recorded)
    masks = prune(net, x, 0.9, repair=False)
    assert list(seen) == list(dict.fromkeys(s.parameter for s in trace(net, x).weights))
    flow = path_oracle(net, x, dict(masks), p_net=0)
    compared = 0
    for layer, found in seen.items():
        maps = flow.layers[layer].inputs
        if not maps:
            continue  # inside nn.MultiheadAttention
        first = maps[0]
        if masks[layer].dim() == 2:
            paths = first.reshape(-1, first.shape[-1]).sum(0)
        else:
            paths = first.movedim(1, 0).flatten(1).sum(1)
        expected = (paths / paths.max()).numpy().reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
        compared += 1
    assert compared >= 3
    history = masks.metadata["history"]
    assert [row["layer"] for row in history] == list(range(1, len(masks) + 1))
    assert all(abs(row["bound"] - row["objective"]) < 1e-9 for row in history)


def test_first_layer_has_the_objective_of_highs() -> None:
    net, x = (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 3)),
        torch.ones(1, 4, 8, 8),
    )
    for sparsity in (0.5, 0.9, 0.97):
        masks = prune(net, x, sparsity, scope="local", repair=False, max_kernel=5, alpha=0.5)
        entries = masks["0.weight"].flatten(2).sum(2).T.numpy()
        b = int(entries.sum())
        needed = np.array([-(-b // 24)])
        layer = LayerProgram(
            np.ones((1, 4)), 6, np.array([b]), np.maximum(5, needed), np.array([1]), 0.5, 1.0
        )
        assert value_of(layer, entries) == pytest.approx(highs(layer), abs=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_same_seed_same_masks(name: str) -> None:
    make, x = NETS[name]
    net = make()
    assert prune(net, x, 0.9, seed=3) == prune(net, x, 0.9, seed=3)
    assert prune(net, x, 0.9, seed=3) != prune(net, x, 0.9, seed=4)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape))
    assert prune(net, x, 0.9, seed=3) == prune(make(), x, 0.9, seed=3)


def test_backends_agree_and_meta_weights_will_do() -> None:
    make, x = NETS["mixed"]
    masks = prune(make(), x, 0.8)
    assert prune(make(), x, 0.8, backend="reference") == masks
    with torch.device("meta"):
        empty = make()
    assert prune(empty, x, 0.8) == masks


def test_threads_do_not_show() -> None:
    script = """
import sys, hashlib, torch, paikern as pk
torch.set_num_threads(int(sys.argv[1]))
net = pk.zoo.create("resnet18", num_classes=10, image_size=32, seed=0)
x = torch.ones(1, 3, 32, 32)
masks = pk.prune(net, "npb", sparsity=0.97, example_inputs=x, apply=False, progress=False)
print(hashlib.sha256(b"".join(masks.packed(n).numpy().tobytes() for n in masks)).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", script, threads], capture_output=True, text=True, check=True
        ).stdout
        for threads in "12"
    }
    assert len(found) == 1


@pytest.mark.parametrize("sparsity", [0.7, 0.95])
def test_place_by_score(sparsity: float) -> None:
    make, x = NETS["mixed"]
    torch.manual_seed(0)
    net = make()
    ranked = prune(net, x, sparsity, place="score", repair=False)
    drawn = prune(net, x, sparsity, repair=False)
    for name, mask in ranked.items():
        if mask.dim() == 2:
            continue
        weight = net.get_parameter(name).detach().flatten(2).abs()
        kernels = mask.flatten(2)
        least = torch.where(kernels, weight, math.inf).amin(2)
        assert bool((least >= torch.where(kernels, -math.inf, weight).amax(2)).all())
    # In the first layer both choose the same kernels.
    assert torch.equal(ranked["stem.weight"].sum((2, 3)), drawn["stem.weight"].sum((2, 3)))


def test_max_kernel_min_node_and_node_constraint() -> None:
    make, x = NETS["resnet20"]
    net = make()
    capped = prune(net, x, 0.8, max_kernel=2, beta=0.0)
    for name, mask in capped.items():
        if mask.dim() == 4 and mask.shape[2] == 3:
            needed = -(-int(mask.sum()) // (mask.shape[0] * mask.shape[1]))
            # Repair may move the budget of another layer here.
            assert int(mask.sum((2, 3)).max()) <= max(2, needed), name
    one = prune(net, x, 0.8, max_kernel={"conv1.weight": 4}, beta=0.0, repair=False)
    assert int(one["conv1.weight"].sum((2, 3)).max()) <= max(
        4, -(-one.kept_by_layer["conv1.weight"] // 48)
    )
    assert int(one["layer1.0.conv1.weight"].sum((2, 3)).max()) > 4
    even = prune(net, x, 0.9, node_constraint=True, repair=False)
    for mask in even.values():
        for dims in ((0,), (1,)):
            sums = mask.flatten(2).sum(2).sum(dims) if mask.dim() > 2 else mask.sum(dims)
            assert int(sums.max()) <= -(-int(mask.sum()) // len(sums))
    covered = prune(net, x, 0.6, alpha=1.0, beta=0.0, min_node=3, scope="local", repair=False)
    mask = covered["layer2.0.conv1.weight"]
    least = min(3, -(-int(mask.sum()) // (mask.shape[0] * mask.shape[1])))
    assert least > 1
    assert int(mask.sum((0, 2, 3)).min()) >= least
    assert int(mask.sum((1, 2, 3)).min()) >= least


@pytest.mark.parametrize("name", ["mlp", "mixed", "resnet20"])
def test_few_outputs_are_another_optimum(name: str) -> None:
    """The objective of a layer for its incoming paths stays; here, later layers leave less out."""
    make, x = NETS[name]
    net = make()
    even, few = (prune(net, x, 0.95, outputs=outputs, repair=False) for outputs in ("even", "few"))
    assert even.kept_by_layer == few.kept_by_layer
    first = next(iter(even))
    assert even.metadata["history"][0]["objective"] == few.metadata["history"][0]["objective"]
    assert all(abs(row["bound"] - row["objective"]) < 1e-9 for row in few.metadata["history"])
    spread = [masks[first].flatten(1).sum(1) for masks in (even, few)]
    assert int(spread[0].max() - spread[0].min()) <= 1
    assert int(spread[1].min()) >= min(1, int(spread[0].min()))
    nodes = [pk.analyze(net, masks, example_inputs=x).effective_nodes for masks in (even, few)]
    assert nodes[1] >= nodes[0]


@pytest.mark.parametrize("outputs", ["even", "few"])
def test_objective_of_the_mask_is_that_of_highs(outputs: str) -> None:
    """Whole networks, every layer: X is counted in the mask, P by float64 autograd."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(5, 7), nn.Linear(7, 4),
    )  # fmt: skip
    x, ratios = torch.ones(1, 3, 8, 8), []
    for sparsity in (0.5, 0.8, 0.9):
        for alpha in (0.01, 0.5):
            masks = prune(net, x, sparsity, alpha=alpha, outputs=outputs, repair=False)
            flow = path_oracle(net, x, dict(masks), p_net=0)
            for name, mask in masks.items():
                maps = flow.layers[name].inputs[0]
                paths = maps.flatten(2).sum(2)[0] if maps.dim() > 2 else maps[0]
                entries = (mask.flatten(2).sum(2) if mask.dim() > 2 else mask.long()).T.numpy()
                positions = mask[0, 0].numel()
                layer = LayerProgram(
                    paths.numpy()[None], entries.shape[1], np.array([entries.sum()]),
                    np.array([positions]), np.array([1]), alpha, 1.0,
                )  # fmt: skip
                best = highs(layer)
                ratios.append((value_of(layer, entries) - best) / max(1.0, abs(best)))
    assert min(ratios) > -1e-6
    assert max(ratios) < 1e-6


def test_alpha_one_covers_the_most_nodes() -> None:
    make, x = NETS["mlp"]
    masks = prune(make(), x, 0.999, alpha=1.0, beta=0.0, repair=False)
    for mask in masks.values():
        out, into = mask.shape
        b = int(mask.sum())
        assert int(mask.any(0).sum()) == min(b, into)
        assert int(mask.any(1).sum()) == min(b, out)


def test_sum_pools() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 4, stride=4)
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            pooled = nn.functional.avg_pool2d(self.a(x), 4)
            both = torch.cat([pooled, self.b(x)], 1)
            return self.fc(both.mean((2, 3)))

    net, x = Two(), torch.ones(1, 2, 8, 8)
    plain = pk.pathgraph.Flow(trace(net, x), pk.pathgraph.Semantics(0))
    summed = pk.pathgraph.Flow(sum_pools(trace(net, x)), pk.pathgraph.Semantics(0))
    state = {n: p.detach() for n, p in net.named_parameters()}
    # 2 paths into each output of a, 32 into each of b; then a mean or a sum over 4 positions.
    assert math.exp(plain.forward(state)) == pytest.approx(2 * 3 * (2 + 32))
    assert math.exp(summed.forward(state)) == pytest.approx(2 * 3 * 4 * (16 * 2 + 32))
    assert prune(net, x, 0.3, pool="sum", alpha=0.0, beta=0.0).kept == prune(net, x, 0.3).kept


def test_layers_without_a_path() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 4), nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(PaikernWarning) as caught:
        masks = prune(Aside(), torch.ones(1, 8), 0.5, scope="local")
    assert "npb: the inputs of unused.weight" in str(caught[-1].message)
    assert masks.kept_by_layer == {"used.weight": 16, "unused.weight": 18}


def test_dead_upstream_names_the_first_dead_layer() -> None:
    """With alpha = 1 a program does not ask whether a path enters a row."""
    net = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
    with pytest.raises(PaikernError, match=r"no path reaches 3\.weight \(none gets past 2\.weight"):
        prune(net, torch.ones(1, 16), 0.995, alpha=1.0, beta=0.0, scope="local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": "a"}, "alpha must be a number"),
        ({"beta": -1.0}, "beta must be >= 0 and finite, got -1.0"),
        ({"beta": math.inf}, "beta must be >= 0 and finite"),
        ({"beta": math.nan}, "beta must be >= 0 and finite"),
        ({"max_kernel": 0}, "max_kernel must be an integer of at least 1, got 0"),
        ({"max_kernel": {"fc": 2.5}}, "max_kernel fc must be an integer"),
        ({"max_kernel": {"nothing": 2}}, "max_kernel: no layer 'nothing' is pruned"),
        ({"min_node": True}, "min_node must be an integer"),
        ({"place": "best"}, r"place must be one of \('random', 'score'\), got 'best'"),
        ({"pool": "max"}, "pool must be one of"),
        ({"outputs": "one"}, r"outputs must be one of \('even', 'few'\), got 'one'"),
        ({"outputs": "few", "node_constraint": True}, "node_constraint=True makes them even"),
        ({"repair": 1}, "repair must be True or False, got 1"),
        ({"node_constraint": None}, "node_constraint must be True or False"),
        ({"scope": "global"}, "scope: npb needs a budget in every layer"),
        ({"rounds": 3}, "rounds=3: npb builds its mask without scores"),
        ({"pattern": "2:4"}, "pattern='2:4': npb builds its mask of single weights"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(nn.Linear(8, 8), torch.ones(1, 8), 0.5, **options)


def test_wrong_weights_and_budgets() -> None:
    net, x = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)),
        torch.ones(1, 2, 4, 4),
    )
    with torch.no_grad():
        net[0].weight[1, 0, 2, 2] = math.nan
    before = net[0].weight.clone()
    assert prune(net, x, 0.5).kept == 52
    with pytest.raises(NonFiniteScoreError, match=r"0\.weight.*NaN"):
        prune(net, x, 0.5, place="score")
    assert torch.equal(net[0].weight.nan_to_num(7), before.nan_to_num(7))
    empty = nn.Linear(4, 4, device="meta")
    with pytest.raises(ValueError, match="place='score': weight is on the meta device"):
        prune(empty, torch.ones(1, 4), 0.5, place="score")
    with pytest.raises(SparsityError, match="at least one weight"):
        prune(net, x, 0.995)
    with pytest.raises(ValueError, match="npb builds masks and has no scores"):
        pk.score(net, "npb", example_inputs=x)


@pytest.mark.parametrize("outputs", [1, 7])
def test_one_input_or_one_output(outputs: int) -> None:
    net = nn.Sequential(nn.Conv2d(1, outputs, 3), nn.Flatten(), nn.Linear(outputs * 4, 1))
    masks = prune(net, torch.ones(1, 1, 4, 4), 0.5)
    assert masks.kept == masks.total - masks.total // 2
