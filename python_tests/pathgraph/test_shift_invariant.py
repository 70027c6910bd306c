"""Maps reduced to channels: what runs on vectors, what does not, and that totals stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from paikern.pathgraph import PathGraph, shift_invariant, trace
from paikern.pathgraph.steps import Expand, MaxPool, Mean, Replay, Step, Weight
from python_tests.pathgraph.circular_nets import circular, circular_nets
from python_tests.pathgraph.helpers import scores_of

Function = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A circular convolution, a function of its map, and a head on the flattened result.

    The spatial axes come first in nothing: the head sees every position, so a value at the wrong
    place would show.
    """

    def __init__(self, fn: Function, size: tuple[int, ...] = (6, 4)) -> None:
        super().__init__()
        self.fn, self.x = fn, torch.ones(1, 2, *size)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1]
        self.conv = conv(2, 4, 3, padding=1, padding_mode="circular", bias=False)
        self.head = nn.Linear(fn(self.conv(self.x)).numel(), 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.fn(self.conv(x)).reshape(1, -1))
        return y


def kinds(graph: PathGraph) -> list[type[Step]]:
    return [type(step) for step in graph.steps]


def assert_equal(model: nn.Module, x: Any, rtol: float = 1e-9, **options: Any) -> PathGraph:
    """Total and scores on vectors are those on maps, in float64."""
    graph = trace(model, x)
    small = shift_invariant(graph)
    expected_log, expected = scores_of(model, x, graph=graph, **options)
    found_log, found = scores_of(model, x, graph=small, **options)
    assert found_log == pytest.approx(expected_log, abs=1e-10)
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores, rtol=rtol, atol=1e-14)
    assert list(found) == list(expected)
    return small


# Each keeps a constant map constant, or is a view of it.
EXACT: dict[str, Function] = {
    "identity": lambda x: x,
    "channel slice": lambda x: x[:, 1:],
    "channel select": lambda x: x[:, 1],
    "crop": lambda x: x[:, :, 1:5:2, 1:],
    "one position": lambda x: x[:, :, 2, 1],
    "one row": lambda x: x[:, :, 2],
    "channels swapped": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "joined along space": lambda x: torch.cat([x, x.flip(2)], 2),
    "stacked": lambda x: torch.stack([x, 2 * x], 1),
    "shuffle": lambda x: x.view(1, 2, 2, 6, 4).transpose(1, 2).reshape(1, 4, 6, 4),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "channels last": lambda x: x.permute(0, 2, 3, 1),
    "positions mixed with channels": lambda x: x.permute(0, 2, 1, 3).reshape(1, 12, 8) * 2,
    "axes dropped": lambda x: x.flatten(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean of one axis": lambda x: x.mean(3, keepdim=True),
    "mean of channels": lambda x: x.mean(1),
    "sum": lambda x: x.sum((2, 3)),
    "sum of one axis": lambda x: x.sum(2) + x.mean(2),
    "max": lambda x: x.amax((2, 3)),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool of one position": lambda x: F.max_pool2d(x, (6, 4)),
    "max_pool dilated": lambda x: F.max_pool2d(x, 2, 1, 1, dilation=2),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "avg_pool borders": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive grid": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (4, 3)),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, (5, 7), mode="bilinear"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "roll": lambda x: x.roll((1, 2), (2, 3)),
    "roll of channels": lambda x: x.roll(1, 1),
    "reflection": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "cropping pad": lambda x: F.pad(x, (-1, 0, -2, -1)),
    "channels padded": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "im2col": lambda x: F.unfold(x, 2),
    "broadcast product": lambda x: x * torch.tensor([1.0, 2.0, 0.5, 3.0]).view(4, 1, 1),
    "product over space": lambda x: x * (1 + torch.arange(4.0)),
    "broadcast sum": lambda x: x + 2 * x.mean((2, 3), keepdim=True),
    "sum with a vector": lambda x: x + x.mean((0, 2, 3)).roll(1, 0).view(4, 1, 1),
    "sum with a row": lambda x: x + (x * (1 + torch.arange(4.0))).mean(2, keepdim=True),
    "flatten after a pool with borders": lambda x: F.avg_pool2d(x, 3, 1, 1).flatten(1),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_step_on_constant_maps(name: str) -> None:
    torch.manual_seed(0)
    model = Between(EXACT[name])
    assert_equal(model, model.x)


@pytest.mark.parametrize("size", [(6,), (3, 4, 5)])
def test_one_and_three_dimensions(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    pool = (F.max_pool1d, F.max_pool3d)[len(size) // 3]
    model = Between(lambda x: pool(x, 2), size)
    assert MaxPool not in kinds(assert_equal(model, model.x))


@given(circular_nets(), st.sampled_from([1, 2]), st.sampled_from(["identity", "scale"]))
@settings(max_examples=30, deadline=None)
def test_random_circular_networks(case: tuple[nn.Module, Tensor], power: int, norm: str) -> None:
    model, x = case
    assert_equal(model, x, power=power, norm=norm)


# What must be found on vectors: no step of these sees a position.
REDUCED: dict[str, nn.Module] = {
    "circular": nn.Sequential(circular(2, 4, 3), nn.ReLU(), circular(4, 4, 3, 2)),
    "zeros": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
    "same": nn.Sequential(nn.Conv2d(2, 4, 4, padding="same"), nn.Conv2d(4, 2, 3, padding="same")),
    "ZeroPad2d": nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(2, 4, 3), nn.ZeroPad2d((0, 1, 2, 0))),
    "pools": nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3), nn.UpsamplingNearest2d(4)
    ),
    "depthwise": nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("name", REDUCED)
def test_no_map_is_made(name: str) -> None:
    model = nn.Sequential(REDUCED[name], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2))
    x = torch.ones(1, 2, 16, 16)
    with torch.no_grad():
        model(x)
    graph = shift_invariant(trace(model, x))
    assert not {Replay, MaxPool} & set(kinds(graph))
    assert graph.inputs == {next(iter(graph.inputs)): (1, 2, 1, 1)}
    for step in graph.steps:
        if isinstance(step, Expand):
            assert step.out_shape[2:] in [(3, 3), (4, 4)]  # a window of the kernel
        if isinstance(step, Weight):
            assert step.positions == 1
            assert step.kind == "linear" or step.groups > 1


@pytest.mark.parametrize(
    "padded",
    [
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(2, 4, 3, bias=False)),
        nn.Conv2d(2, 4, 3, padding="same", bias=False),
        nn.Conv2d(2, 4, 3, stride=2, padding=3, bias=False),
    ],
    ids=["a step of its own", "same", "stride"],
)
def test_padding_is_ignored_wherever_it_is(padded: nn.Module) -> None:
    """All three score as the unpadded convolution does, up to the number of outputs in R."""
    weight = next(iter(padded.parameters()))
    plain = nn.Conv2d(2, 4, 3, bias=False)
    plain.weight = weight
    found = []
    for model in (plain, padded):
        graph = shift_invariant(trace(model, torch.ones(1, 2, 8, 8)))
        found.append(next(iter(scores_of(model, torch.ones(1, 2, 8, 8), graph=graph)[1].values())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)


def test_values_by_hand() -> None:
    """Two convolutions of one channel that would lose counts at a border: a = 1, 6, 60."""
    model = nn.Sequential(*(nn.Conv1d(1, 1, 3, padding=1, bias=False) for _ in range(2)))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[[1.0, -2.0, 3.0]]]))
        model[1].weight.copy_(torch.tensor([[[5.0, 0.0, -5.0]]]))
    x = torch.ones(1, 1, 4)
    log_total, found = scores_of(model, x, graph=shift_invariant(trace(model, x)))
    assert torch.tensor(log_total).exp() == pytest.approx(4 * 60)  # four positions
    assert (found["0.weight"] * 240).flatten().tolist() == pytest.approx([40, 80, 120])
    assert (found["1.weight"] * 240).flatten().tolist() == pytest.approx([120, 0, 120])


def test_outputs_keep_their_shape_and_the_graph_stays() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()), torch.ones(1, 2, 6, 7)
    graph = trace(model, x)
    before = list(graph.steps)
    small = shift_invariant(graph)
    (last,) = [step for step in small.steps if step.output in small.outputs]
    assert isinstance(last, Expand)
    assert last.out_shape == (1, 3, 4, 5)
    assert list(graph.steps) == before
    assert all(a is b for a, b in zip(graph.steps, before, strict=True))


def test_nothing_convolved_nothing_changed() -> None:
    graph = trace(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(1, 5, 4))
    assert shift_invariant(graph) is graph


def test_whole_maps_where_they_are_needed() -> None:
    """Transposed convolutions and attention see positions; the next convolution their mean."""
    torch.manual_seed(0)
    model = nn.Sequential(
        circular(2, 3, 3), nn.ConvTranspose2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 3, bias=False),
    ).eval()  # fmt: skip
    x = torch.ones(1, 2, 5, 5)
    graph = shift_invariant(trace(model, x))
    transposed = next(step for step in graph.weights if step.transposed)
    assert transposed.in_shape == (1, 3, 5, 5)
    assert transposed.out_shape == (1, 4, 11, 11)
    assert kinds(graph).count(Mean) == 1
    _, found = scores_of(model, x, graph=graph)
    for scores in found.values():  # a chain: every layer holds all of R
        assert float(scores.sum()) == pytest.approx(1, rel=1e-12)


def test_a_step_without_a_rule_is_refused() -> None:
    graph = trace(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2))
    odd = Step((graph.steps[-1].output,), 99, "", "aten.odd")
    broken = PathGraph((*graph.steps, odd), graph.inputs, (99,))
    with pytest.raises(TypeError, match="shift_invariant: no rule for a step Step"):
        shift_invariant(broken)
