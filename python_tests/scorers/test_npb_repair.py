"""Weights on no path are moved: nothing effective is lost, and all are used if they can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.prunable import prunable_parameters
from paikern.scorers import NPB, Run
from python_tests.oracles import topology_oracle
from python_tests.scorers.npb_nets import NETS


def pair(
    net: nn.Module, x: torch.Tensor, sparsity: float, **options: Any
) -> tuple[pk.MaskSet, pk.MaskSet]:
    before, after = (
        pk.prune(
            net, "npb", sparsity=sparsity, example_inputs=x, apply=False, progress=False,
            repair=repair, **options,
        )
        for repair in (False, True)
    )  # fmt: skip
    return before, after


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98])
def test_nothing_is_lost(name: str, sparsity: float) -> None:
    make, x = NETS[name]
    sparsity -= 0.03 * (name == "mixed")  # 98 % leave it 6 weights in the shared layer
    net = make()
    for seed in range(3):
        before, after = pair(net, x, sparsity, seed=seed)
        assert before.kept == after.kept
        old, new = (pk.analyze(net, m, example_inputs=x) for m in (before, after))
        assert new.effective_params >= old.effective_params
        assert new.log_paths >= old.log_paths - 1e-9
        assert new.effective_nodes >= old.effective_nodes
        if new.effective_params < after.kept:
            assert "there was no free place left" in after.metadata["notes"][-1]


def test_every_weight_is_effective_where_there_is_room() -> None:
    make, x = NETS["resnet20"]
    net = make()
    before, after = pair(net, x, 0.98)
    old, new = (topology_oracle(net, dict(m), x) for m in (before, after))
    assert old.effective_params < before.kept
    assert new.effective_params == after.kept
    for name, mask in before.items():
        shapes = old.layers[name]
        if shapes.effective_params == shapes.kept:
            assert bool((after[name] >= mask).all())


def built(net: nn.Module, x: torch.Tensor, kept: list[int], repair: bool) -> tuple[Run, pk.MaskSet]:
    """The masks under the given budgets, paths alone counting in the programs."""
    state = {n: p.detach() for n, p in net.named_parameters()}
    run = Run(net, state, prunable_parameters(net), x)
    masks = NPB(alpha=0.0, beta=0.0, repair=repair).build(run, kept)
    return run, pk.MaskSet(masks, run.shapes)


def test_a_layer_without_a_free_place_passes_its_budget_on() -> None:
    """The middle has 3 live inputs and, since the end takes its 2 best outputs, 6 useful places.

    Of its 8 weights 4 lead there and 2 find room; the last layer takes the other 2.
    """
    net, x = nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 6), nn.Linear(6, 40)), torch.ones(1, 1)
    _, before = built(net, x, [3, 8, 20], repair=False)
    old = pk.analyze(net, before, example_inputs=x)
    assert [layer.effective_params for layer in old.layers] == [3, 4, 20]
    run, after = built(net, x, [3, 8, 20], repair=True)
    assert list(after.kept_by_layer.values()) == [3, 6, 22]
    assert pk.analyze(net, after, example_inputs=x).effective_params == 31
    assert not run.notes


def test_what_fits_nowhere_stays_and_is_told() -> None:
    net, x = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)), torch.ones(1, 1)
    run, after = built(net, x, [2, 1], repair=True)
    assert after["0.weight"].tolist() == [[True], [True]]
    assert after["1.weight"].tolist() == [[True, False]]
    assert run.notes == ["npb: 1 weights are kept on no path, there was no free place left on one"]
