"""Tables, walks and keeping in Triton's interpreter: equal to the CPU's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paikern import ops
from python_tests.ops.walk_cases import RandomNet, drawn, tables_of, walks_of
from python_tests.pathgraph.walk_nets import make
from python_tests.triton.helpers import both

pytestmark = pytest.mark.triton


def same(net: nn.Module, x: Tensor, weighting: str, count: int, **options: bool) -> Tensor:
    w = walks_of(net, x, **options)
    whole = options.get("whole", False)
    found, tables = both(lambda: tables_of(w, weighting))
    assert torch.equal(found, tables)
    walks, wanted = both(
        lambda: drawn(w, tables, weighting=weighting, whole=whole, count=count, first=3)
    )
    assert torch.equal(walks, wanted)
    return walks


@pytest.mark.parametrize(
    ("name", "weighting"),
    [("mlp", "abs"), ("chain", "inverse"), ("grouped", "square"),
     ("squeezed", "abs"), ("attends", "square")],
)  # fmt: skip
def test_tables_and_walks(name: str, weighting: str) -> None:
    net, x = make(name)
    walks = same(net, x, weighting, 41)
    assert int((walks[:, 0] >= 0).sum()) > 15
    if name in ("mlp", "grouped"):
        same(net, x, weighting, 30, whole=True)


def test_shortcuts_may_be_taken() -> None:
    same(*make("residual"), "abs", 20, skips=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_and_zeros(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 19, 2), nn.ReLU(), nn.Conv2d(19, 9, (2, 1)))
    with torch.no_grad():
        net[0].weight.mul_(2.0 ** torch.randint(-20, 5, net[0].weight.shape))
        net[0].weight[:, 1] = 0
        net[2].weight[3] = 0
        net[2].weight[:, :, 1] = 0
    net.to(dtype)
    for weighting in ("abs", "inverse"):
        same(net, torch.ones(1, 3, 6, 6, dtype=dtype), weighting, 128)


def test_weights_of_several_types_and_walks_of_large_numbers() -> None:
    w = walks_of(*make("mlp"))
    for kinds in ((torch.float16, torch.bfloat16), (torch.float64, torch.float32)):
        w.weights[:] = [t.to(kind) for t, kind in zip(w.weights, kinds, strict=True)]
        tables = tables_of(w)
        for first, seed in ((2**40 + 1, 2**63), (0, -1)):
            walks = both(lambda t=tables, f=first, s=seed: drawn(w, t, first=f, seed=s, count=33))
            assert torch.equal(*walks)


@pytest.mark.parametrize("seed", range(4))
def test_random_networks(seed: int) -> None:
    net = RandomNet(seed)
    same(net, torch.ones(1, net.inputs), ("abs", "inverse")[seed % 2], 20, skips=seed > 1)


def some_walks(count: int, width: int, bits: int) -> Tensor:
    """Walks of any length that share bits, with some that pass one twice."""
    walks = torch.randint(0, bits, (count, width))
    ends = torch.randint(0, width + 1, (count,))
    return torch.where(torch.arange(width) < ends[:, None], walks, -1)


def keep(
    walks: Tensor, target: int, size: int, stall: int = 1, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """Bits and state after two batches."""
    bits, state = torch.zeros(size, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    bits[0], state[0] = 3, 2
    for part in walks.split(2 * len(walks) // 3 + 1):
        ops.phew_keep_(bits, state, part, target=target, stall=stall, exact=exact)
    return bits, state


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("count", "width", "size"), [(40, 3, 9), (1700, 5, 400), (2400, 4, 100)])
def test_keeping(count: int, width: int, size: int, exact: bool) -> None:
    walks = some_walks(count, width, 8 * size)
    for share in (0.0, 0.5, 0.97, 1.1):
        for stall in (0, 30):
            target = int(8 * size * share)
            found, wanted = both(
                lambda t=target, s=stall: keep(walks, t, size, stall=s, exact=exact)
            )
            assert all(map(torch.equal, found, wanted))


def test_keeping_ends_for_each_of_its_reasons() -> None:
    walks = torch.tensor([[2, 4]]).repeat(2500, 1)
    endless = walks.clone()
    endless[1000:] = torch.tensor([5, 6])
    for held, target, status in ((walks, 4, 1), (walks, 8, 2), (endless, 5, 3), (walks, 2, 1)):
        found, wanted = both(lambda h=held, t=target: keep(h, t, 1))
        assert all(map(torch.equal, found, wanted))
        assert int(found[1][5]) == status


def test_bits_that_begin_anywhere() -> None:
    walks = torch.tensor([[0, 9, 17], [23, 24, 39], [3, -1, -1]])
    for begin in range(4):

        def kept(begin: int = begin) -> Tensor:
            whole = torch.zeros(12, dtype=torch.uint8)
            state = torch.zeros(6, dtype=torch.int64)
            ops.phew_keep_(whole[begin : begin + 5], state, walks, target=6)
            return whole

        assert torch.equal(*both(kept))
