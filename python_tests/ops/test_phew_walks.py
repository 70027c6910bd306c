"""Tables, walks and keeping: both backends bit for bit, any batch, any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paikern as pk
from paikern import ops
from paikern.backends import registry
from paikern.backends.reference_phew import _philox
from paikern.ops.phew_keep import STATE
from paikern.pathgraph import trace
from paikern.pathgraph.units import walk_graph
from paikern.pathgraph.walks import flattened
from paikern.prunable import prunable_parameters
from python_tests.ops.walk_cases import RandomNet, drawn, tables_of, walks_of
from python_tests.pathgraph.helpers import state_of
from python_tests.pathgraph.walk_nets import NETS, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("weighting", ["abs", "square", "inverse"])
@pytest.mark.parametrize("name", NETS)
def test_backends_agree_bit_for_bit(name: str, weighting: str) -> None:
    net, x = make(name)
    for whole, skips in ((False, False), (True, True)):
        w = walks_of(net, x, skips=skips, whole=whole)
        found = []
        for backend in ("cpu", "reference"):
            with registry.using(backend):
                tables = tables_of(w, weighting)
                walks = drawn(w, tables, weighting=weighting, whole=whole)
            found.append((tables, walks))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
        assert int((found[0][1][:, 0] >= 0).sum()) > 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_zeros(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Conv2d(3, 37, 3), nn.ReLU(), nn.Conv2d(37, 20, (2, 1)))
    with torch.no_grad():
        net[0].weight[:, 1] = 0  # no kernel of an input
        net[2].weight[3] = 0  # no kernel of an output
        net[2].weight[:, :, 1] = 0  # half of every kernel
    net.to(dtype)
    w = walks_of(net, torch.ones(1, 3, 6, 6, dtype=dtype))
    assert {t.dtype for t in w.weights} == {dtype}
    found = []
    for backend in ("cpu", "reference"):
        with registry.using(backend):
            found.append(drawn(w, tables_of(w), count=300))
    assert torch.equal(*found)
    part, size = w.parts["2.weight"]
    bits = found[0][(found[0] >= 8 * part) & (found[0] < 8 * (part + size))] - 8 * part
    rows = bits // (37 * 2)
    assert bool((bits % 2 == 0)[rows != 3].all())
    assert bool((rows == 3).any())  # backwards from its output, uniformly
    assert bool((bits % 2 == 1)[rows == 3].any())


@pytest.mark.parametrize("name", ["chain", "residual", "attends"])
def test_walks_depend_on_their_number_alone(name: str) -> None:
    w = walks_of(*make(name))
    tables = tables_of(w)
    whole = drawn(w, tables, count=500)
    for parts in ([1, 7, 492], [250, 250], [499, 1]):
        first, found = 0, []
        for count in parts:
            found.append(drawn(w, tables, first=first, count=count))
            first += count
        assert torch.equal(torch.cat(found), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            assert torch.equal(tables_of(w), tables)
            assert torch.equal(drawn(w, tables, count=500), whole)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(drawn(w, tables, count=500, seed=6), whole)
    assert torch.equal(drawn(w, tables, count=500, seed=5 - 2**64), whole)
    far = 2**40
    assert not torch.equal(drawn(w, tables, first=far, count=500), whole)


def test_philox_known_answers() -> None:
    """The known answers published with Random123."""
    assert _philox([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 2**32 - 1
    assert _philox([ones] * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_the_hand_examples() -> None:
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 3], [0, 1]]))
    w = walks_of(net, torch.ones(1, 2))
    walks = drawn(w, tables_of(w), count=40_000)[:, 0]
    forwards, backwards = walks[0::2].view(-1, 2), walks[1::2].view(-1, 2)
    assert bool((forwards[:, 0] == 0).all())  # P(. | i = 0) = (1, 0)
    assert float((forwards[:, 1] == 1).double().mean()) == pytest.approx(3 / 4, abs=0.02)
    assert set(forwards[:, 1].tolist()) == {1, 3}
    assert float((backwards[:, 0] == 0).double().mean()) == pytest.approx(1 / 4, abs=0.02)
    assert bool((backwards[:, 1] == 3).all())  # P(. | o = 1) = (0, 1)

    conv = nn.Conv2d(1, 1, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[[1.0, 1], [2, 0]]]]))
    w = walks_of(conv, torch.ones(1, 1, 3, 3))
    counts = torch.bincount(drawn(w, tables_of(w), count=40_000)[:, 0], minlength=4) / 40_000
    torch.testing.assert_close(counts, torch.tensor([0.25, 0.25, 0.5, 0.0]), atol=0.012, rtol=0)


@pytest.mark.filterwarnings("ignore:.*the embedding .* shares it")
@pytest.mark.parametrize("name", [n for n in NETS if n != "class_token"])
@pytest.mark.parametrize("skips", [False, True])
def test_every_walk_is_a_path_of_the_network(name: str, skips: bool) -> None:
    """The path engine, which knows nothing of walks, finds all that one walk passed on paths.

    Whole kernels, and no class token: walks are not told which position they pass.
    """
    net, x = make(name)
    shapes = {n: layer.shape for n, layer in prunable_parameters(net).items()}
    state = state_of(net)
    w = flattened(walk_graph(trace(net, x), state, identity_skips=skips), state, shapes, whole=True)
    walks = drawn(w, tables_of(w), count=30, whole=True)
    for walk in walks:
        passed = walk[walk >= 0]
        if not len(passed):
            continue
        bits = torch.zeros(8 * w.nbytes, dtype=torch.bool)
        bits[passed] = True
        found = {}
        for parameter, (first, _) in w.parts.items():
            numel = torch.Size(shapes[parameter]).numel()
            found[parameter] = bits[8 * first : 8 * first + numel].view(shapes[parameter])
        top = pk.analyze(net, pk.MaskSet.from_bool(found), example_inputs=x)
        assert top.effective_params == len(passed.unique())
    assert int((walks[:, 0] >= 0).sum()) >= 20


def test_starts_take_turns() -> None:
    net = nn.Linear(7, 3, bias=False)
    w = walks_of(net, torch.ones(1, 7))
    walks = drawn(w, tables_of(w), count=2 * 7 * 3 + 8)[:, 0]
    starts = torch.bincount(walks[0::2] % 7, minlength=7)
    ends = torch.bincount(walks[1::2] // 7, minlength=3)
    assert int(starts.max() - starts.min()) <= 1
    assert int(ends.max() - ends.min()) <= 1


def keep(walks: Tensor, target: int, size: int = 4, **options: Any) -> tuple[Tensor, list[int]]:
    found = []
    for backend in ("cpu", "reference"):
        bits, state = torch.zeros(size, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
        with registry.using(backend):
            ops.phew_keep_(bits, state, walks, target=target, **options)
        found.append((bits, state))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    return ops.unpack_mask(found[0][0], (8 * size,)), found[0][1].tolist()


def test_keeping_skips_walks_that_are_too_long() -> None:
    walks = torch.tensor([[0, 1, 2], [1, -1, -1], [3, 4, 5], [2, 9, -1], [7, 7, -1], [8, -1, -1]])
    bits, state = keep(walks, 5)
    assert bits.nonzero().flatten().tolist() == [0, 1, 2, 7, 9]
    assert state == [5, 5, 5, 1, 1, 1]
    bits, state = keep(walks, 5, exact=False)
    assert bits.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert state[:2] == [6, 3]


def test_keeping_ends_where_walks_bring_nothing_new() -> None:
    walks = torch.tensor([[0, 1]]).repeat(2500, 1)
    _, state = keep(walks, 3)
    assert dict(zip(STATE, state, strict=True)) == {
        "kept": 2, "walks": 2000, "window_new": 0, "window_skipped": 0, "skipped": 0, "status": 2,
    }  # fmt: skip
    assert keep(walks, 3, stall=3)[1][1:] == [1000, 0, 0, 0, 2]
    assert keep(walks, 3, stall=0)[1][1] == 2500
    walks[1000:] = torch.tensor([5, 6])
    assert keep(walks, 3)[1] == [2, 2000, 0, 0, 1000, 3]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_keeping_in_batches_is_keeping_at_once(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    walks = torch.randint(0, 60, (90, 4), generator=generator)
    exact = data.draw(st.booleans())
    target = data.draw(st.integers(0, 70))
    at_once, state = keep(walks, target, size=8, exact=exact)
    bits, running = torch.zeros(8, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    for part in walks.split(data.draw(st.integers(1, 40))):
        ops.phew_keep_(bits, running, part, target=target, exact=exact)
    assert torch.equal(ops.unpack_mask(bits, (64,)), at_once)
    assert running.tolist() == state
    assert int(at_once.sum()) == state[0]
    assert state[0] <= target + (0 if exact else 3)


def test_the_operations_are_proper_torch_operations() -> None:
    w = walks_of(*make("residual"))
    tables = tables_of(w)
    torch.library.opcheck(
        torch.ops.paikern.phew_tables.default, (w.weights, w.geometry, w.table_size, 0)
    )
    torch.library.opcheck(
        torch.ops.paikern.phew_walks.default,
        (w.weights, tables, w.geometry, w.graph, 5, 0, 40, w.width, 0, False),
    )
    bits, state = torch.zeros(w.nbytes, dtype=torch.uint8), torch.zeros(6, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.paikern.phew_keep_.default, (bits, state, drawn(w, tables), 100, 1, True)
    )


def test_what_does_not_fit_is_refused() -> None:
    w = walks_of(*make("chain"))
    tables = tables_of(w)
    with pytest.raises(ValueError, match="weighting must be one of abs, square, inverse"):
        tables_of(w, "cube")
    with pytest.raises(ValueError, match=r"geometry must be int64 \[1, 8\]"):
        ops.phew_tables(w.weights[:1], w.geometry, w.table_size)
    with pytest.raises(ValueError, match=r"weight 0 of shape \[2, 5, 3, 3\] does not fit"):
        ops.phew_tables([w.weights[0].transpose(0, 1), *w.weights[1:]], w.geometry, w.table_size)
    with pytest.raises(ValueError, match="tables of 3 entries"):
        ops.phew_tables(w.weights, w.geometry, 3)
    with pytest.raises(ValueError, match="must be those of phew_tables"):
        drawn(w, tables.double())
    with pytest.raises(ValueError, match="count=-1"):
        drawn(w, tables, count=-1)
    state = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match="walks hold bit 64, bits has 8"):
        ops.phew_keep_(torch.zeros(1, dtype=torch.uint8), state, torch.tensor([[64]]), target=1)
    with pytest.raises(ValueError, match=r"state must be int64 \[6\]"):
        ops.phew_keep_(torch.zeros(1, dtype=torch.uint8), state[:5], torch.tensor([[1]]), target=1)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    skips=st.booleans(),
    weighting=st.sampled_from(["abs", "square", "inverse"]),
)
def test_random_networks(seed: int, skips: bool, weighting: str) -> None:
    """Both backends agree; every walk is a path, through zeros only where there is nothing else."""
    net = RandomNet(seed)
    x = torch.ones(1, net.inputs)
    w = walks_of(net, x, skips=skips)
    found = []
    for backend in ("cpu", "reference"):
        with registry.using(backend):
            tables = tables_of(w, weighting)
            found.append(drawn(w, tables, count=24, weighting=weighting))
    assert torch.equal(*found)
    shapes = {n: p.shape for n, p in net.named_parameters()}
    for walk in found[0][:8]:
        passed = walk[walk >= 0]
        bits = torch.zeros(8 * w.nbytes, dtype=torch.bool)
        bits[passed] = True
        masks = {
            name: bits[8 * first : 8 * first + shapes[name].numel()].view(shapes[name])
            for name, (first, _) in w.parts.items()
        }
        used = {n for n, m in masks.items() if bool(m.any())}
        for name in used:
            ((o, i),) = masks[name].nonzero().tolist()
            weight = net.get_parameter(name)
            assert weight[o, i] != 0 or not weight[:, i].any() or not weight[o].any()
        if used:
            top = pk.analyze(net, pk.MaskSet.from_bool(masks), example_inputs=x)
            assert top.effective_params == len(passed)
