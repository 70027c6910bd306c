"""Models with wrapped blocks inside, and models that keep what they have computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import paikern as pk
from paikern._copying import copied
from paikern.errors import PathRuleError
from paikern.pathgraph import exported, trace

METHODS: dict[str, dict[str, Any]] = {
    "synflow": {"rounds": 3},
    "px": {"rounds": 3},
    "phew": {},
    "dpai": {"steps": 3},
    "npb": {},
    "l1_filters": {},
    "snap": {},
    "earlybird": {},
    "gate_decorators": {},
    "crop_s": {},
}


class Block(nn.Module):
    """conv - norm - relu - conv, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.b(self.norm(self.a(x)).relu())
        return y


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def samples() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return torch.randn(12, 3, 6, 6, generator=drawn), torch.arange(12) % 4


@pytest.mark.parametrize(
    ("method", "wrap"),
    [(method, nn.DataParallel) for method in METHODS]
    + [(method, lambda b: torch.compile(b, backend="eager")) for method in ("synflow", "snap")],
)
@pytest.mark.filterwarnings("ignore:.*would have lost all channels:paikern.PaikernWarning")
def test_a_wrapped_block_is_pruned_like_the_block(
    method: str, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    plain, wrapped = network(), network()
    wrapped[3] = wrap(wrapped[3])
    arguments = {"sparsity": 0.5, "data": samples(), "progress": False, **METHODS[method]}
    expected = pk.prune(plain, method, apply=False, **arguments)
    found = pk.prune(wrapped, method, **arguments)
    assert found == expected
    assert found.node_sparsity == expected.node_sparsity
    found.verify(wrapped)
    counts = [pk.analyze(m, found, example_inputs=samples()[0]) for m in (plain, wrapped)]
    assert counts[0] == counts[1]


def test_exported_programs_know_wrapped_blocks_by_the_same_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrapped = network()
    wrapped[3] = nn.DataParallel(wrapped[3])
    expected = [step.parameter for step in trace(network(), samples()[0]).weights]
    called = []
    program = exported.program

    def seen(*arguments: Any) -> Any:
        called.append(True)
        return program(*arguments)

    def refused(*arguments: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(exported, "program", seen)
    monkeypatch.setattr("paikern.pathgraph.capture.run", refused)
    assert [step.parameter for step in trace(wrapped, samples()[0]).weights] == expected
    assert called


class Keeping(nn.Module):
    """Keeps its features, alone and in a list, as for a loss on them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.features: Tensor | None = None
        self.all: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.a(x).relu()
        self.all = [self.features]
        y: Tensor = self.b(self.features)
        return y


@pytest.mark.parametrize("method", ["synflow", "px", "snap", "dpai", "npb"])
def test_models_that_keep_activations(method: str) -> None:
    torch.manual_seed(0)
    net = Keeping()
    data = torch.randn(12, 6), torch.arange(12) % 3
    arguments = {"sparsity": 0.5, "data": data, "apply": False, **METHODS[method]}
    expected = pk.prune(copy.deepcopy(net), method, **arguments)
    net(data[0])
    features = net.features
    assert pk.prune(net, method, **arguments) == expected
    assert net.features is features
    assert features is not None
    assert features.requires_grad


def test_shrink_of_a_model_that_keeps_activations() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 6)
    net[1].seen = net[0](x)
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    small = pk.shrink(net, masks, example_inputs=x)
    assert small[0].weight.shape == (4, 6)
    torch.testing.assert_close(small(x), net(x))


def test_weights_under_a_pruning_hook_are_refused_by_path_methods_in_one_line() -> None:
    net = network()
    torch_prune.l1_unstructured(net[0], "weight", 0.5)
    with (
        pytest.warns(UserWarning, match="was assigned during export"),
        pytest.raises(PathRuleError, match=r"module '0': its weight is computed from .* fold it"),
    ):
        pk.prune(net, "synflow", sparsity=0.5, data=samples())


def test_copies_share_nothing_with_the_model() -> None:
    net = Keeping()
    net(torch.ones(2, 6))
    twin = copied(net)
    assert twin.features is not None
    assert not twin.features.requires_grad
    assert twin.features is twin.all[0]  # one tensor stays one
    assert torch.equal(twin.features, net.features)  # type: ignore[arg-type]
    with torch.no_grad():
        twin.features.zero_()
        twin.a.weight.zero_()
    assert bool(net.features.any())  # type: ignore[union-attr]
    assert bool(net.a.weight.any())
