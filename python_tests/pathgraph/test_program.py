"""The native sweeps against the sweeps that call one operation after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from paikern import ops, zoo
from paikern.backends import registry
from paikern.errors import NonFiniteScoreError
from paikern.pathgraph import Flow, Semantics, compiled, trace
from paikern.pathgraph.places import Map, _place
from paikern.pathgraph.program import Program

SEMANTICS = {
    "counts": (Semantics(power=0), "exponent"),
    "published counts": (Semantics(power=0), "input_max"),
    "synflow": (Semantics(1, "scale"), "exponent"),
    "squared": (Semantics(2, "scale"), "exponent"),
    "published synflow": (Semantics(1, "scale", offsets=True), "exponent"),
}


class Odd(nn.Module):
    """What has no native form beside what has: concatenation, a permutation, two outputs, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=2, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.across = nn.Linear(12, 6)
        self.line = nn.Conv1d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.norm(self.stem(x)))
        y = torch.cat([self.up(F.relu(self.grouped(x))), x], 1)
        y = self.pool(y).permute(0, 2, 3, 1)
        y = F.relu(self.across(y)).flatten(1, 2).transpose(1, 2)
        y = self.line(y)
        y = F.max_pool1d(y, 2)
        return self.head(y.mean(-1)), x.mean((2, 3))


class Branches(nn.Module):
    """Residual branches of unequal exponents, and a value that three steps read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.deep = nn.Sequential(*(nn.Sequential(nn.Linear(9, 9), nn.ReLU()) for _ in range(6)))
        self.last = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.last(self.deep(x) + x + F.relu(x))
        return y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: zoo.create("mlp", sizes=(7, 33, 12, 3)), (1, 7)),
    "resnet20": (lambda: zoo.create("resnet20"), (1, 3, 16, 16)),
    "odd": (Odd, (1, 3, 12, 12)),
    "branches": (Branches, (1, 6)),
    "vit": (
        lambda: zoo.create("vit_b_16", image_size=32, dim=24, layers=2, heads=3, num_classes=5),
        (1, 3, 32, 32),
    ),
}


def built(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = make().eval()
    state = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    return model, state, torch.ones(shape)


def random_masks(state: dict[str, Tensor], names: list[str], density: float) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {n: ops.pack_mask(torch.rand(state[n].shape, generator=g) < density) for n in names}


def compile_for(flow: Flow, state: dict[str, Tensor], names: list[str], keep: str) -> Program:
    found = compiled(flow, state, names, keep)
    assert found is not None
    return found


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_sweep_gives_the_same_paths(name: str, semantics: str) -> None:
    model, state, x = built(name)
    graph = trace(model, x)
    rule, rescale = SEMANTICS[semantics]
    names = list(dict.fromkeys(step.parameter for step in graph.weights))
    masks = random_masks(state, names, 0.6)
    expected = Flow(graph, rule, rescale=rescale).forward(state, masks)
    program = compile_for(Flow(graph, rule, rescale=rescale), state, names, "scores")
    for i, parameter in enumerate(names):
        program.native.set_mask(i, masks[parameter].data_ptr())
    assert math.isfinite(expected)
    # Means and totals are summed in double here and in float there: 1e-7 relative of R.
    for _ in range(2):  # maps share memory: a second sweep must not see the first
        assert program.native.forward() == pytest.approx(expected, abs=2e-6)


def test_log_paths_agree_with_float64() -> None:
    model, state, x = built("odd")
    graph = trace(model, x)
    truth = Flow(graph, Semantics(1, "scale"), dtype=torch.float64).forward(state)
    names = list(dict.fromkeys(step.parameter for step in graph.weights))
    program = compile_for(Flow(graph, Semantics(1, "scale")), state, names, "scores")
    assert program.native.forward() == pytest.approx(truth, abs=2e-6)


def test_dead_step_is_named() -> None:
    model, state, x = built("branches")
    graph = trace(model, x)
    names = list(dict.fromkeys(step.parameter for step in graph.weights))
    program = compile_for(Flow(graph, Semantics(0)), state, names, "nodes")
    none = torch.zeros(12, dtype=torch.uint8)
    program.native.set_mask(names.index("last.weight"), none.data_ptr())
    assert program.native.forward() == -math.inf
    assert program.name(program.native.dead) == "last.weight"


def test_overflow_is_named() -> None:
    model, state, x = built("branches")
    state["deep.2.0.weight"] = torch.full((9, 9), 3e38)
    graph = trace(model, x)
    program = compile_for(Flow(graph, Semantics(2)), state, [], "scores")
    assert program.native.forward() == -math.inf
    error = program.overflow()
    assert isinstance(error, NonFiniteScoreError)
    assert "deep.2.0.weight" in str(error)


def test_maps_share_memory() -> None:
    model, state, x = built("resnet20")
    flow = Flow(trace(model, x), Semantics(0))
    maps = sum(
        2 * math.prod(v.shape) for v in compile_for(flow, state, [], "nodes")._values.values()
    )
    assert compile_for(flow, state, [], "nodes").arena_bytes < 0.6 * 4 * maps


@pytest.mark.parametrize("why", ["meta", "float64 weight", "float64 maps", "reference"])
def test_what_the_native_sweeps_cannot_run_is_left_to_flow(why: str) -> None:
    model, state, x = built("mlp")
    graph = trace(model, x)
    dtype = torch.float64 if why == "float64 maps" else torch.float32
    if why == "meta":
        state = {n: t.to("meta") for n, t in state.items()}
    if why == "float64 weight":
        state = {n: t.double() for n, t in state.items()}
    with registry.using("reference" if why == "reference" else None):
        assert compiled(Flow(graph, Semantics(1), dtype=dtype), state, [], "scores") is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 20), st.integers(0, 20)),
        min_size=1,
        max_size=40,
    )
)
def test_maps_alive_together_do_not_overlap(rows: list[tuple[int, int, int]]) -> None:
    maps = [Map(numel, min(a, b), max(a, b)) for numel, a, b in rows]
    top = _place(maps)
    for i, m in enumerate(maps):
        assert m.offset % 16 == 0
        assert m.offset + m.numel <= top
        for other in maps[:i]:
            if other.first <= m.last and m.first <= other.last:
                apart = m.offset + m.numel <= other.offset or other.offset + other.numel <= m.offset
                assert apart
