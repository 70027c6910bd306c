"""The native f and g against the general way, on the shapes that a program has to lay out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from paikern import ops, zoo
from paikern.pathgraph import trace
from paikern.pathgraph.gated import GatedModel
from paikern.pathgraph.gated_program import GatedGraph, lower


def state_of(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def both(
    model: nn.Module, x: Tensor, density: float, pool_gate: bool = False
) -> tuple[GatedGraph, GatedModel, Tensor, Tensor]:
    """Native and general networks under one random mask, and their totals of x."""
    state = state_of(model)
    generator = torch.Generator().manual_seed(1)
    names = [n for n, p in model.named_parameters() if p.dim() > 1]
    masks = {
        n: ops.pack_mask(torch.rand(state[n].shape, generator=generator) < density) for n in names
    }
    program = lower(trace(model, x), state, "cpu", torch.float32, pool_gate)
    assert program is not None
    general = GatedModel(model, {n: n for n in names}, pool_gate)
    totals = []
    for networks in (program, general):
        networks.load(state, masks)
        ((total, exponent),) = networks.totals(x)
        totals.append(total * 2.0**exponent)
    return program, general, *totals


def conv(*args: int, **kwargs: object) -> nn.Module:
    """A convolution between two others, so that its planes are neither input nor output."""
    torch.manual_seed(0)
    inner = nn.Conv2d(*args, **kwargs)  # type: ignore[arg-type]
    return nn.Sequential(
        nn.Conv2d(2, args[0], 3, padding=1), nn.ReLU(), inner, nn.BatchNorm2d(args[1]), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(args[1], 3),
    )  # fmt: skip


CONVOLUTIONS = {
    "3x3": conv(4, 8, 3, padding=1),
    "5x5 valid": conv(4, 6, 5),
    "stride 2": conv(4, 8, 3, stride=2, padding=1),
    "stride 3x1": conv(4, 5, (2, 3), stride=(3, 1), padding=(0, 2)),
    "dilated": conv(4, 8, 3, padding=2, dilation=2),
    "1x1 stride 2": conv(4, 8, 1, stride=2),
    "groups": conv(4, 8, 3, padding=1, groups=2),
    "depthwise": conv(4, 4, 3, padding=1, groups=4),
    "kernel as wide as the map": conv(4, 8, 11),
    "padding wider than needed": conv(4, 8, 1, padding=3),
}


@pytest.mark.parametrize("density", [1.0, 0.6, 0.35, 0.1])
@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions(name: str, density: float) -> None:
    x = torch.randn(9, 2, 11, 13 if "wide as" not in name else 11)
    _, _, found, expected = both(CONVOLUTIONS[name].eval(), x, density)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6 * float(expected.max()))


class Branches(nn.Module):
    """An add with a ReLU, an add without, a tensor added to itself, a norm before a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 3, padding=1)
        self.c = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.relu(self.b(torch.relu(self.norm(x))) + x)
        y = self.c(y) + y
        y = torch.relu(y + y)
        y = nn.functional.max_pool2d(y, 3, 2, padding=1)
        return self.head(y.flatten(1))


@pytest.mark.parametrize("pool_gate", [False, True])
@pytest.mark.parametrize("samples", [1, 5, 300])
def test_branches_and_pools(samples: int, pool_gate: bool) -> None:
    torch.manual_seed(1)
    _, _, found, expected = both(Branches().eval(), torch.randn(samples, 2, 8, 8), 0.6, pool_gate)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_deep_dense_network_does_not_overflow() -> None:
    """576**24 = 2**220 paths; g would be infinite without exponents."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(2, 64, 3, padding=1), nn.ReLU()]
    for _ in range(24):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 3)).eval()
    _, _, found, expected = both(net, torch.randn(2, 2, 4, 4) * 1e-3, 0.95)
    assert float(expected.max()) > 2.0**130
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_maps_are_used_again() -> None:
    net = zoo.create("resnet20", seed=0).eval()
    program = lower(
        trace(net, torch.ones(1, 3, 32, 32)), state_of(net), "cpu", torch.float32, False
    )
    assert program is not None
    assert len(program.maps) == 13  # of 25 values: three of each size, the input, the end


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Flatten()),
    ],
    ids=["layer norm", "conv1d"],
)
def test_what_a_program_cannot_hold(net: nn.Module) -> None:
    graph = trace(net, torch.ones(1, 6))
    assert lower(graph, state_of(net), "cpu", torch.float32, False) is None


def test_a_program_that_says_less_than_the_model_is_found_out() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.position = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x) - self.position))

    torch.manual_seed(0)
    net, x = Shifted().eval(), torch.randn(4, 6)
    program, general, _, _ = both(net, x, 0.8)
    output = general.output(x)
    assert output is not None
    assert not program.agrees(x, output, general.totals(x))


ISA = """
import torch
from paikern.backends import cpu
from python_tests.pathgraph.test_gated_program import CONVOLUTIONS, both
x = torch.randn(9, 2, 11, 13, generator=torch.Generator().manual_seed(0))
for name in ("3x3", "stride 2", "groups"):
    for density in (0.6, 0.2):
        _, _, found, expected = both(CONVOLUTIONS[name].eval(), x, density)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
print(cpu.isa())
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_narrower_instruction_sets(isa: str) -> None:
    from paikern.backends import cpu

    if ("portable", "avx2", "avx512").index(cpu.isa()) < ("portable", "avx2").index(isa):
        pytest.skip(f"this machine has no {isa}")
    environment = os.environ | {"PAIKERN_CPU_ISA": isa}
    run = subprocess.run(
        [sys.executable, "-c", ISA], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == isa
