"""Channel groups of small networks whose couplings can be read off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paikern.pathgraph import trace
from paikern.pathgraph.channels import ChannelGroups, channel_groups
from paikern.prunable import prunable_parameters
from python_tests.channel_nets import COUPLED, build, conv, head


def groups_of(net: nn.Module, x: torch.Tensor, **filters: object) -> ChannelGroups:
    state = {name: p.detach() for name, p in net.named_parameters()}
    return channel_groups(trace(net, x), state, prunable_parameters(net, **filters))


def layers(found: ChannelGroups) -> list[set[str]]:
    return [{name.removesuffix(".weight") for name in group.rows} for group in found]


@pytest.mark.parametrize("name", list(COUPLED))
def test_layers_that_are_coupled(name: str) -> None:
    assert layers(groups_of(*build(name))) == [set(group) for group in COUPLED[name]]


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("mlp", "layers.5", "those of the model"),
        ("attentive", "map", "all channels"),
        ("groupnorm", "1", "normalises over"),
        ("shuffled", "stem.0", "takes its channels apart"),
        ("transformer", "inside", "normalises over"),
        ("transformer", "down", "normalises over"),
    ],
)
def test_reasons_why_a_layer_stays_whole(name: str, layer: str, reason: str) -> None:
    assert reason in groups_of(*build(name)).kept_whole[f"{layer}.weight"]


def test_a_flattened_map_feeds_each_channel_to_as_many_columns() -> None:
    first, second, _ = groups_of(*build("vgg"))
    assert second.columns["4.weight"].tolist() == [c for c in range(6) for _ in range(16)]
    assert first.columns["2.0.weight"].tolist() == list(range(8))
    assert second.norms["2.1"].tolist() == list(range(6))


def test_a_concatenation_offsets_the_columns() -> None:
    stem, first, *_ = groups_of(*build("dense"))
    assert first.columns["convs.1.weight"].tolist() == [-1] * 6 + [0, 1, 2, 3]
    assert first.columns["convs.2.weight"].tolist() == [-1] * 6 + [0, 1, 2, 3] + [-1] * 4
    assert stem.norms["norms.2"].tolist() == [0, 1, 2, 3, 4, 5] + [-1] * 8


def test_a_convolution_with_groups_keeps_as_many_channels_in_each() -> None:
    before, inside, after = groups_of(*build("grouped"))
    assert (before.size, inside.size, after.size) == (3, 2, 6)
    assert before.rows["0.0.weight"].tolist() == [0, 1, 2] * 4
    assert inside.rows["1.0.weight"].tolist() == [0, 1] * 4
    assert before.nodes.tolist() == [4, 4, 4]


def test_coupled_layers_share_their_channels() -> None:
    group = groups_of(*build("residual")).groups[0]
    assert all(rows.tolist() == list(range(8)) for rows in group.rows.values())
    assert group.nodes.tolist() == [3] * 8


def test_layers_left_out_hold_what_they_touch() -> None:
    net, x = build("vgg")
    found = groups_of(net, x, ignore=["2.0"])
    assert layers(found) == [{"4"}]
    assert "left out" in found.kept_whole["0.0.weight"]  # its reader may not lose columns


def test_a_weight_used_twice_stays_whole() -> None:
    shared = nn.Linear(6, 6)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), shared, nn.ReLU(), shared, nn.Linear(6, 2))
    found = groups_of(net, torch.randn(2, 5))
    assert layers(found) == []
    assert "more than once" in found.kept_whole["2.weight"]


def test_a_skip_from_the_input_holds_what_is_added_to_it() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.back, self.head = conv(3, 6), conv(6, 3), head(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.back(self.inside(x)))

    found = groups_of(Skip().eval(), torch.randn(1, 3, 8, 8))
    assert layers(found) == [{"inside.0"}]
    assert "keeps its width" in found.kept_whole["back.0.weight"]


@pytest.mark.parametrize(
    ("operation", "free"),
    [
        (lambda x: x.softmax(1), False),  # divides by a sum over channels
        (lambda x: x.softmax(2), True),
        (lambda x: x / x.pow(2).mean(1, keepdim=True).sqrt(), False),  # a norm by hand
        (lambda x: x.flip(1), False),
        (lambda x: x[:, :4] * x[:, 4:], False),
        (lambda x: nn.functional.pad(x, (0, 0, 0, 0, 1, 1)), False),
        (lambda x: nn.functional.pad(x, (1, 1, 1, 1)), True),
        (lambda x: nn.functional.pixel_shuffle(x, 2), False),
        (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), True),
        (lambda x: x * torch.arange(1.0, 9.0).view(8, 1, 1), False),
        (lambda x: x * 3.0, True),
        (lambda x: nn.functional.avg_pool2d(x, 2), True),
        (lambda x: x.amax((2, 3), keepdim=True), True),
        (lambda x: torch.cat([x, x], 1), True),
        (lambda x: torch.cat([x, x], 2), True),
    ],
    ids=["softmax over channels", "softmax over rows", "norm by hand", "flip", "halves",
         "padded channels", "padded map", "pixel shuffle", "permute", "factors", "factor", "pool",
         "maximum", "twice", "below each other"],
)  # fmt: skip
def test_what_an_operation_does_to_channels(operation: object, free: bool) -> None:
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.next, self.head = nn.Conv2d(width, 4, 1), head(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.next(operation(self.stem(x))))  # type: ignore[operator]

    width = operation(torch.ones(1, 8, 8, 8)).shape[1]  # type: ignore[operator]
    found = groups_of(Net(width), torch.randn(1, 3, 8, 8))
    assert ({"stem"} in layers(found)) == free
