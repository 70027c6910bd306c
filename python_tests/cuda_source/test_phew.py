"""Tables, walks and keeping by the CUDA sources: the bits of the CPU's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paikern import ops
from paikern.backends import registry
from python_tests.cuda_source import shim
from python_tests.ops.walk_cases import RandomNet, drawn, tables_of, walks_of
from python_tests.pathgraph.walk_nets import NETS, make

pytestmark = pytest.mark.cuda_source
WEIGHTINGS = ("abs", "square", "inverse")


def same(net: nn.Module, x: Tensor, weighting: str, count: int, **options: bool) -> Tensor:
    w = walks_of(net, x, **options)
    whole = options.get("whole", False)
    found = []
    for backend in ("cpu", "cuda_source"):
        with registry.using(backend):
            tables = tables_of(w, weighting)
            walks = drawn(w, tables, weighting=weighting, whole=whole, count=count, first=3)
        found.append((tables, walks))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    return found[0][1]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("name", NETS)
def test_tables_and_walks(name: str, weighting: str) -> None:
    net, x = make(name)
    walks = same(net, x, weighting, 101)
    assert int((walks[:, 0] >= 0).sum()) > 30
    same(net, x, weighting, 40, skips=True, whole=True)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_every_dtype_and_zeros(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 37, 3), nn.ReLU(), nn.Conv2d(37, 20, (2, 1)))
    with torch.no_grad():
        net[0].weight.mul_(2.0 ** torch.randint(-20, 5, net[0].weight.shape))
        net[0].weight[:, 1] = 0
        net[2].weight[3] = 0
        net[2].weight[:, :, 1] = 0
    net.to(dtype)
    for weighting in WEIGHTINGS:
        same(net, torch.ones(1, 3, 6, 6, dtype=dtype), weighting, 200)


def test_weights_of_several_types_and_walks_of_large_numbers() -> None:
    w = walks_of(*make("residual"))
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    w.weights[:] = [t.to(kinds[i % 4]) for i, t in enumerate(w.weights)]
    for first, seed in ((2**40 + 1, 2**63), (0, -1)):
        found = []
        for backend in ("cpu", "cuda_source"):
            with registry.using(backend):
                found.append(drawn(w, tables_of(w), first=first, seed=seed, count=130))
        assert torch.equal(*found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), skips=st.booleans(), weighting=st.sampled_from(WEIGHTINGS))
def test_random_networks(seed: int, skips: bool, weighting: str) -> None:
    net = RandomNet(seed)
    same(net, torch.ones(1, net.inputs), weighting, 40, skips=skips)


def begun(size: int) -> Tensor:
    """Bytes of which some bits are set."""
    return (torch.arange(size) * 37 & 0x11).to(torch.uint8)


def kept(walks: Tensor, target: int, size: int, **options: int | bool) -> list[int]:
    """The state after keeping `walks` in two batches, on both backends, from the same bits."""
    found = []
    for backend in ("cpu", "cuda_source"):
        bits = begun(size)
        state = torch.zeros(6, dtype=torch.int64)
        state[0] = ops.unpack_mask(bits, (8 * size,)).sum()
        with registry.using(backend):
            for part in walks.split(2 * len(walks) // 3 + 1):
                ops.phew_keep_(bits, state, part, target=target, **options)
        assert int(ops.unpack_mask(bits, (8 * size,)).sum()) == int(state[0])
        found.append((bits, state))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    return found[0][1].tolist()


def some_walks(generator: torch.Generator, count: int, width: int, bits: int) -> Tensor:
    """Walks of any length that share bits, with some that pass one twice."""
    walks = torch.randint(0, bits, (count, width), generator=generator)
    ends = torch.randint(0, width + 1, (count,), generator=generator)
    return torch.where(torch.arange(width) < ends[:, None], walks, -1)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    count=st.sampled_from((0, 1, 40, 1001, 2500)),
    width=st.integers(1, 9),
    size=st.integers(1, 90),
    share=st.floats(0, 1.1),
    stall=st.sampled_from((0, 1, 5)),
    exact=st.booleans(),
)
def test_keeping(
    seed: int, count: int, width: int, size: int, share: float, stall: int, exact: bool
) -> None:
    walks = some_walks(torch.Generator().manual_seed(seed), count, width, 8 * size)
    kept(walks, int(8 * size * share), size, stall=stall, exact=exact)


def test_keeping_counts_nothing_beforehand_while_the_budget_is_far() -> None:
    walks = some_walks(torch.Generator().manual_seed(0), 2300, 30, 80_000)
    mask = ops.unpack_mask(begun(10_000), (80_000,))
    mask[walks[walks >= 0]] = True
    assert kept(walks, 79_000, 10_000)[:2] == [int(mask.sum()), 2300]


def test_keeping_ends_for_each_of_its_reasons() -> None:
    same = torch.tensor([[1, 2]]).repeat(2500, 1)
    assert kept(same, 8, 1)[5] == 2
    assert kept(same, 2, 1) == [2, 1, 2, 0, 0, 1]
    assert kept(same, 8, 1, stall=0)[5] == 0
    same[1000:] = torch.tensor([5, 6])
    assert kept(same, 3, 1) == [2, 2000, 0, 0, 1000, 3]
    assert kept(same, 3, 1, exact=False) == [4, 1001, 2, 0, 0, 1]
    assert kept(same, 0, 1) == [0, 0, 0, 0, 0, 1]


def test_bits_that_begin_anywhere() -> None:
    walks = torch.tensor([[0, 9, 17], [23, 24, 39], [3, -1, -1]])
    for begin in range(5):
        found = []
        for backend in ("cpu", "cuda_source"):
            whole = torch.zeros(12, dtype=torch.uint8)
            state = torch.zeros(6, dtype=torch.int64)
            with registry.using(backend):
                ops.phew_keep_(whole[begin : begin + 5], state, walks, target=6)
            found.append(whole)
        assert torch.equal(*found)


def test_results_do_not_depend_on_the_order_of_warps(on_cpu: shim.OnCpu) -> None:
    walks = some_walks(torch.Generator().manual_seed(3), 1700, 12, 4000)
    try:
        for way in (1, 2):
            on_cpu.order(way)
            for target in (2000, 3500, 3990):
                kept(walks, target, 500)
    finally:
        on_cpu.order(0)
