"""How often walks pass a weight, against the exact probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from paikern import ops
from paikern.pathgraph import trace
from paikern.pathgraph.units import walk_graph
from paikern.pathgraph.walks import flattened
from python_tests.pathgraph.helpers import state_of
from python_tests.pathgraph.walk_nets import Block

DRAWS = 100_000


def visits(
    net: nn.Module, x: Tensor, seed: int, skips: bool = False, weighting: str = "abs"
) -> Visits:
    """How often `DRAWS` walks of each direction pass each element of each weight."""
    state = state_of(net)
    shapes = {n: tuple(p.shape) for n, p in net.named_parameters() if p.dim() > 1}
    w = flattened(walk_graph(trace(net, x), state, identity_skips=skips), state, shapes)
    tables = ops.phew_tables(w.weights, w.geometry, w.table_size, weighting=weighting)
    walks = ops.phew_walks(
        w.weights, tables, w.geometry, w.graph, seed=seed, first=0, count=2 * DRAWS, width=w.width,
        weighting=weighting,
    )  # fmt: skip
    found = []
    for part in (walks[0::2], walks[1::2]):
        counts = torch.bincount(part[part >= 0], minlength=8 * w.nbytes).double()
        found.append(
            {
                name: counts[8 * first : 8 * first + torch.Size(shapes[name]).numel()].view(
                    shapes[name]
                )
                for name, (first, _) in w.parts.items()
            }
        )
    return found[0], found[1]


Visits = tuple[dict[str, Tensor], dict[str, Tensor]]


def chances(
    w: Tensor, units: Tensor, forwards: bool, weighting: str = "abs"
) -> tuple[Tensor, Tensor]:
    """P of every element of a weight `[O, I, ...]` entered by `units`, and of the units behind."""
    size = w.detach().double().flatten(2) if w.dim() > 2 else w.detach().double().unsqueeze(-1)
    m = size**2 if weighting == "square" else size.abs()
    n = m.sum(-1)
    share = 1 / n if weighting == "inverse" else n
    if forwards:
        kernel = share / share.sum(0) * units
    else:
        kernel = share / share.sum(1, keepdim=True) * units[:, None]
    element = kernel.unsqueeze(-1) * m / n.unsqueeze(-1)
    return element.view(w.shape), kernel.sum(1 if forwards else 0)


def uniform(units: int) -> Tensor:
    return torch.full((units,), 1 / units, dtype=torch.float64)


def p_value(counts: Tensor, chance: Tensor) -> float:
    """Chi-square of counts against probabilities; rare elements are put together."""
    expected = chance.flatten().numpy() * float(counts.sum()) / float(chance.sum())
    found = counts.flatten().numpy()
    rare = expected < 5
    if rare.any():
        found = np.append(found[~rare], found[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    held = expected > 0
    assert not found[~held].any()
    return float(stats.chisquare(found[held], expected[held] * found.sum() / expected.sum()).pvalue)


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 4)
    )


def convs() -> nn.Sequential:
    """A kernel that is not square, then positions of a flattened map."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 18, (2, 3), padding=1), nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, 4, 3),
        nn.Flatten(), nn.Linear(4 * 5 * 2, 6),
    )  # fmt: skip


def expected_mlp(net: nn.Sequential, weighting: str = "abs") -> Iterator[tuple[int, str, Tensor]]:
    for way, order in ((0, (0, 2, 4)), (1, (4, 2, 0))):
        units = uniform(6 if way == 0 else 4)
        for at in order:
            chance, units = chances(net[at].weight, units, way == 0, weighting)
            yield way, f"{at}.weight", chance


@pytest.mark.parametrize("weighting", ["abs", "square", "inverse"])
@pytest.mark.parametrize("seed", range(4))
def test_an_mlp_is_walked_with_the_exact_probabilities(seed: int, weighting: str) -> None:
    net = mlp()
    found = visits(net, torch.ones(1, 6), seed, weighting=weighting)
    for way, name, chance in expected_mlp(net, weighting):
        assert p_value(found[way][name], chance) > 1e-4, (way, name)


def test_the_chi_square_sees_another_weighting() -> None:
    net = mlp()
    found = visits(net, torch.ones(1, 6), 0, weighting="square")
    for way, name, chance in expected_mlp(net):
        assert p_value(found[way][name], chance) < 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_convolutions_and_flattening(seed: int) -> None:
    net = convs()
    forwards, backwards = visits(net, torch.ones(1, 3, 6, 4), seed)
    chance, units = chances(net[0].weight, uniform(3), True)
    assert p_value(forwards["0.weight"], chance) > 1e-4
    chance, units = chances(net[3].weight, units, True)
    assert p_value(forwards["3.weight"], chance) > 1e-4
    positions = net[5].weight.shape[1] // 4
    chance, _ = chances(net[5].weight, units.repeat_interleave(positions) / positions, True)
    assert p_value(forwards["5.weight"], chance) > 1e-4

    chance, units = chances(net[5].weight, uniform(6), False)
    assert p_value(backwards["5.weight"], chance) > 1e-4
    chance, units = chances(net[3].weight, units.view(4, positions).sum(1), False)
    assert p_value(backwards["3.weight"], chance) > 1e-4
    chance, _ = chances(net[0].weight, units, False)
    assert p_value(backwards["0.weight"], chance) > 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_a_shortcut_with_a_weight_is_taken_by_half(seed: int) -> None:
    torch.manual_seed(5)
    block = Block(5, 7)
    forwards, backwards = visits(block, torch.ones(1, 5, 4, 4), seed)
    chance, _ = chances(block.shortcut.weight, uniform(5) / 2, True)
    assert p_value(forwards["shortcut.weight"], chance) > 1e-4
    chance, units = chances(block.a.weight, uniform(5) / 2, True)
    assert p_value(forwards["a.weight"], chance) > 1e-4
    assert p_value(forwards["b.weight"], chances(block.b.weight, units, True)[0]) > 1e-4
    chance, _ = chances(block.shortcut.weight, uniform(7) / 2, False)
    assert p_value(backwards["shortcut.weight"], chance) > 1e-4
    chance, units = chances(block.b.weight, uniform(7) / 2, False)
    assert p_value(backwards["b.weight"], chance) > 1e-4
    assert p_value(backwards["a.weight"], chances(block.a.weight, units, False)[0]) > 1e-4
    for found in (forwards, backwards):
        through = float(found["shortcut.weight"].sum())
        assert stats.binomtest(int(through), DRAWS, 0.5).pvalue > 1e-4
        assert through + float(found["a.weight"].sum()) == DRAWS


@pytest.mark.parametrize(("skips", "share"), [(False, 1.0), (True, 0.5)])
def test_an_identity_skip_is_a_branch_if_asked_for(skips: bool, share: float) -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(2, 5, 1), Block(5, 5))
    for found in visits(net, torch.ones(1, 2, 4, 4), 0, skips=skips):
        assert float(found["0.weight"].sum()) == DRAWS
        passed = int(found["1.a.weight"].sum())
        if share == 1.0:
            assert passed == DRAWS
        else:
            assert stats.binomtest(passed, DRAWS, share).pvalue > 1e-4


def test_groups_keep_to_themselves() -> None:
    torch.manual_seed(7)
    net = nn.Conv2d(6, 40, 1, groups=2)
    forwards, backwards = visits(net, torch.ones(1, 6, 2, 2), 1)
    for half in range(2):
        w = net.weight[20 * half : 20 * half + 20]
        part = slice(20 * half, 20 * half + 20)
        chance, _ = chances(w, uniform(3) / 2, True)
        assert p_value(forwards["weight"][part], chance) > 1e-4
        chance, _ = chances(w, uniform(20) / 2, False)
        assert p_value(backwards["weight"][part], chance) > 1e-4
