"""The walk graph: units, what meets what, branches, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paikern.pathgraph import trace
from paikern.pathgraph.units import (
    INPUT,
    JOINT,
    OUTPUT,
    WEIGHT,
    Node,
    Slot,
    WalkGraph,
    owners,
    walk_graph,
)
from python_tests.pathgraph.helpers import state_of
from python_tests.pathgraph.walk_nets import NETS, Attends, Block, Residual, make


def graph_of(net: nn.Module, x: Tensor, skips: bool = False) -> WalkGraph:
    return walk_graph(trace(net, x), state_of(net), identity_skips=skips)


def pairs(graph: WalkGraph, slot: Slot) -> set[tuple[int, int, int]]:
    """(source node, its unit, unit met)."""
    found = set()
    for source, met in zip(slot.sources.tolist(), slot.meets.tolist(), strict=True):
        (node,) = owners(graph.nodes, torch.tensor([source]))
        found.add((node, source - graph.nodes[node].base, met))
    return found


def weight(graph: WalkGraph, parameter: str) -> Node:
    (node,) = (n for n in graph.nodes if n.step is not None and n.step.parameter == parameter)
    return node


class Between(nn.Module):
    """A convolution to 6 channels of 4x4, something, and a layer."""

    def __init__(self, between: Callable[[Tensor], Tensor], after: nn.Module) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(2, 6, 3, padding=1), between, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.between(self.a(x).relu()))
        return y


X = torch.ones(1, 2, 4, 4)
SIX = {(1, c, c) for c in range(6)}
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module, set[tuple[int, int, int]]]] = {
    "nothing": (lambda y: y, nn.Conv2d(6, 3, 3), SIX),
    "max_pool": (lambda y: F.max_pool2d(y, 3, 2, 1), nn.Conv2d(6, 3, 1), SIX),
    "avg_pool": (lambda y: F.avg_pool2d(y, 3, 2, 1), nn.Conv2d(6, 3, 1), SIX),
    "pad": (lambda y: F.pad(y, (1, 1, 0, 2)), nn.Conv2d(6, 3, 1), SIX),
    "mean": (lambda y: y.mean((2, 3)), nn.Linear(6, 3), SIX),
    "maximum": (lambda y: y.amax((2, 3)), nn.Linear(6, 3), SIX),
    "resize": (lambda y: F.interpolate(y, scale_factor=2), nn.Conv2d(6, 3, 1), SIX),
    "flatten": (
        lambda y: y.flatten(1),
        nn.Linear(96, 3),
        {(1, c, 16 * c + m) for c in range(6) for m in range(16)},
    ),
    "last": (
        lambda y: y.permute(0, 2, 3, 1).flatten(1),
        nn.Linear(96, 3),
        {(1, c, 6 * m + c) for c in range(6) for m in range(16)},
    ),
    "slice": (lambda y: y[:, 1:6:2], nn.Conv2d(3, 3, 1), {(1, 1, 0), (1, 3, 1), (1, 5, 2)}),
    "shuffle": (
        lambda y: y.view(1, 2, 3, 4, 4).transpose(1, 2).flatten(1, 2),
        nn.Conv2d(6, 3, 1),
        {(1, 3 * g + c, 2 * c + g) for c in range(3) for g in range(2)},
    ),
    "tokens": (lambda y: y.flatten(2).transpose(1, 2), nn.Linear(6, 3), SIX),
    "space_to_depth": (
        lambda y: F.pixel_unshuffle(y, 2),
        nn.Conv2d(24, 3, 1),
        {(1, c, 4 * c + p) for c in range(6) for p in range(4)},
    ),
    "masked": (
        lambda y: y * torch.tensor([1.0, 0, 1, 0, 1, 1]).view(1, 6, 1, 1),
        nn.Conv2d(6, 3, 1),
        {(1, c, c) for c in (0, 2, 4, 5)},
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_two_weights(name: str) -> None:
    between, after, expected = BETWEEN[name]
    graph = graph_of(Between(between, after), X)
    assert [n.kind for n in graph.nodes] == [INPUT, WEIGHT, WEIGHT, OUTPUT]
    (slot,) = graph.nodes[2].slots
    assert pairs(graph, slot) == expected
    assert slot.meets.tolist() == sorted(slot.meets.tolist())


def test_depth_to_space_spreads_four_channels_over_one() -> None:
    net = Between(lambda y: F.pixel_shuffle(torch.cat([y, y[:, :2]], 1), 2), nn.Conv2d(2, 3, 1))
    (slot,) = weight(graph_of(net, X), "b.weight").slots
    meets = {(c, c // 4) for c in range(6)} | {(0, 1), (1, 1)}
    assert {(unit, met) for _, unit, met in pairs(graph_of(net, X), slot)} == meets


@pytest.mark.parametrize(
    "mixing",
    [
        lambda y: y.mean(1, keepdim=True),
        lambda y: y.amax(1, keepdim=True),
        lambda y: F.avg_pool2d(y.transpose(1, 2), 2).transpose(1, 2),
        lambda y: F.max_pool2d(y.transpose(1, 2), 2).transpose(1, 2),
        lambda y: y.cumsum(1),
    ],
)
def test_steps_that_mix_units_are_refused(mixing: Callable[[Tensor], Tensor]) -> None:
    class Mixer(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return mixing(y)

    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), Mixer(), nn.LazyConv2d(3, 1))
    net(X)
    with pytest.raises(NotImplementedError, match=r"1: aten\.\w+ mixes units"):
        graph_of(net, X)


def test_inputs_are_channels_features_or_elements() -> None:
    assert graph_of(nn.Conv2d(2, 3, 3), X).nodes[0].units == 2
    assert graph_of(nn.Linear(5, 3), torch.ones(1, 7, 5)).nodes[0].units == 5
    flat = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    assert graph_of(flat, X).nodes[0].units == 32


def test_identity_skips_are_left_out_unless_asked_for() -> None:
    net, x = make("residual")
    plain, skips = graph_of(net, x), graph_of(net, x, skips=True)
    assert (plain.dropped, skips.dropped) == (2, 0)
    assert [n.units for n in plain.nodes if n.kind == JOINT] == [6]  # the 1x1 shortcut alone
    assert [n.units for n in skips.nodes if n.kind == JOINT] == [4, 6, 6]
    joint = next(n for n in plain.nodes if n.kind == JOINT)
    sources = [{node for node, _, _ in pairs(plain, slot)} for slot in joint.slots]
    names = [{plain.nodes[n].step.parameter for n in nodes} for nodes in sources]  # type: ignore[union-attr]
    assert names == [{"blocks.1.b.weight"}, {"blocks.1.shortcut.weight"}]
    for slot in joint.slots:
        assert [(unit, met) for _, unit, met in sorted(pairs(plain, slot))] == [
            (c, c) for c in range(6)
        ]


def test_a_gate_is_no_skip() -> None:
    graph = graph_of(*make("squeezed"))
    joint = next(n for n in graph.nodes if n.kind == JOINT)
    assert graph.dropped == 0
    assert [len(slot.sources) for slot in joint.slots] == [6, 6]


def test_concatenation_splits_the_range() -> None:
    graph = graph_of(*make("dense"))
    (slot,) = weight(graph, "layers.2.weight").slots
    expected = {(0, c, c) for c in range(3)}
    expected |= {(1, c, 3 + c) for c in range(4)} | {(2, c, 7 + c) for c in range(4)}
    assert pairs(graph, slot) == expected


def test_a_sum_with_zero_padded_channels_has_them_from_one_side() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(self.a(x), (0, 0, 0, 0, 1, 1)) + self.b(x)

    graph = graph_of(Padded(), X)
    joint = next(n for n in graph.nodes if n.kind == JOINT)
    assert joint.units == 6
    narrow, wide = ({m: u for _, u, m in pairs(graph, s)} for s in joint.slots)
    assert {(narrow.get(unit), wide[unit]) for unit in range(6)} == {
        (None, 0), (0, 1), (1, 2), (2, 3), (3, 4), (None, 5),
    }  # fmt: skip


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_stays_in_its_head(grouped: bool) -> None:
    net = Attends(grouped)
    graph = graph_of(net, torch.ones(1, 3, 6))
    joint = next(n for n in graph.nodes if n.kind == JOINT and len(n.slots) == 3)
    heads = {(h, e): 2 * h + e for h in range(4) for e in range(2)}
    repeat = 2 if grouped else 1
    for slot, first, of in zip(
        joint.slots, (0, 8, 8 + 2 * net.kv), (1, repeat, repeat), strict=True
    ):
        expected = {(first + 2 * (h // of) + e, unit) for (h, e), unit in heads.items()}
        assert {(u, m) for _, u, m in pairs(graph, slot)} == expected


def test_attention_of_other_widths_meets_every_feature_of_the_head() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                t(x).unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q, self.k, self.v)
            )
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    graph = graph_of(Narrow(), torch.ones(1, 5, 4))
    joint = next(n for n in graph.nodes if n.kind == JOINT)
    wide = {(head, 3 * head + e) for head in range(2) for e in range(3)}
    found = [{(u, m) for _, u, m in pairs(graph, s)} for s in joint.slots]
    assert found == [wide, wide, {(u, u) for u in range(6)}]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_every_network_has_a_walk_graph(name: str, skips: bool) -> None:
    graph = graph_of(*make(name), skips=skips)
    assert graph.nodes[-1].kind == OUTPUT
    bases = [n.base for n in graph.nodes]
    assert bases == sorted(bases)
    for number, node in enumerate(graph.nodes):
        for slot in node.slots:
            assert max(owners(graph.nodes, slot.sources)) < number
            assert 0 <= int(slot.meets.min()) <= int(slot.meets.max()) < node.width


def test_a_skip_over_two_blocks_is_seen() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(2, 4, 1), nn.Sequential(Block(4, 4), Block(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.body(x)

    assert graph_of(Long(), X).dropped == 3
    assert graph_of(Residual(), torch.ones(1, 2, 6, 6)).dropped == 2
