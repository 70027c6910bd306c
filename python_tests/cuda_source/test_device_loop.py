"""Whole rounds from a table of instructions: the masks are those of the native loop on the CPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern.backends import cuda_flow
from paikern.backends.cuda_select import settled_rounds
from paikern.errors import NonFiniteScoreError, PaikernError
from paikern.pathgraph import Flow, Semantics, trace
from paikern.pathgraph.device_program import DeviceProgram
from paikern.scorers import device_loop
from python_tests.cuda_source import shim

pytestmark = pytest.mark.cuda_source


class Branches(nn.Module):
    """Residuals, groups, a transposed convolution, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.b1 = nn.BatchNorm2d(6)
        self.c2 = nn.Conv2d(6, 6, 3, padding=1)
        self.c3 = nn.Conv2d(6, 8, 1, stride=2)
        self.c4 = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.l1, self.l2 = nn.Linear(8, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b1(self.c1(x)))
        x = x + self.c2(x)
        y = self.c3(x) + self.c4(x)
        return self.l1(y.mean((2, 3))) + self.l2(self.up(y).mean((2, 3)))


def pooled() -> nn.Module:
    """Overlapping windows with padding, a mean and a norm with statistics."""
    norm = nn.BatchNorm2d(8)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), norm, nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 5, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    torch.manual_seed(3)
    assert norm.running_var is not None
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    return net


def deep() -> nn.Module:
    """Counts far beyond float32."""
    net = nn.Sequential(*(m for _ in range(30) for m in (nn.Linear(24, 24), nn.ReLU())))
    for p in net.parameters():
        p.data.mul_(1e3)
    return net


def transformer(name: str, inputs: Tensor, **options: Any) -> tuple[nn.Module, Tensor]:
    return pk.zoo.create(name, **options), inputs


TOKENS = torch.zeros(1, 6, dtype=torch.long)


class OnePosition(nn.Module):
    """Grouped convolutions of one position, whose rows see the columns of their group alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 16, 1, groups=8)
        self.c, self.out = nn.Conv2d(16, 16, 1, groups=16, padding=1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x)).mean((2, 3), keepdim=True)
        x = torch.relu(self.b(torch.relu(self.a(x))))
        return self.out(torch.relu(self.c(x)).mean((2, 3)))


def sequences() -> nn.Module:
    """One axis, with a pool whose windows overlap and a norm over two."""
    return nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.ReLU(), nn.MaxPool1d(3, 2, 1), nn.LayerNorm((6, 7)),
        nn.Conv1d(6, 4, 2, dilation=2), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


class Rows(nn.Module):
    """A projection whose rows are used by two steps, `first` of them by one."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first
        self.fused = nn.Parameter(torch.randn(20, 16))
        self.out = nn.Linear(12, 3)
        self.other = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        a = nn.functional.linear(x, self.fused[: self.first])
        b = nn.functional.linear(x, self.fused[self.first :])
        small, large = (a, b) if self.first == 8 else (b, a)
        return self.out(torch.relu(self.other(torch.relu(small)) + torch.relu(large)))


def plain() -> nn.Module:
    """Convolutions one after the other: maps are read by the next one as they were written."""
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 7, 3, stride=2), nn.ReLU(),
        nn.Conv2d(7, 5, 2, groups=1), nn.Flatten(), nn.Linear(45, 9), nn.ReLU(), nn.Linear(9, 3),
    )  # fmt: skip
    for scale, p in zip((90.0, 1, 1e-3, 1, 7.0, 1, 0.3, 1, 2.0, 1), net.parameters(), strict=True):
        p.data.mul_(scale)
    return net


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (pk.zoo.create("mlp", sizes=(20, 33, 17, 5)), torch.ones(1, 20)),
    "branches": lambda: (Branches(), torch.ones(1, 3, 8, 8)),
    "pooled": lambda: (pooled(), torch.ones(2, 2, 9, 9)),
    "one position": lambda: (OnePosition(), torch.ones(1, 3, 5, 5)),
    "sequences": lambda: (sequences(), torch.ones(1, 2, 15)),
    "rows": lambda: (Rows(8), torch.ones(1, 16)),
    "rows, the larger part first": lambda: (Rows(12), torch.ones(1, 16)),
    "plain": lambda: (plain(), torch.ones(1, 2, 10, 10)),
    "deep": lambda: (deep(), torch.ones(1, 24)),
    "resnet20": lambda: (pk.zoo.create("resnet20"), torch.ones(1, 3, 8, 8)),
    "gpt2": lambda: transformer(
        "gpt2", TOKENS, layers=2, dim=16, heads=2, vocabulary=32, positions=8, sequence=6
    ),
    "gpt2, 20 tokens": lambda: transformer(
        "gpt2", torch.zeros(1, 20, dtype=torch.long), layers=2, dim=16, heads=2, vocabulary=32,
        positions=24, sequence=20,
    ),
    "llama": lambda: transformer("llama-tiny", TOKENS),
    "vit": lambda: transformer(
        "vit_b_16", torch.ones(1, 3, 16, 16), num_classes=5, image_size=16, patch=8, layers=2,
        dim=16, heads=2,
    ),
}  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[device_loop.DeviceLoop]:
    """The device loops that a test has run, so that it knows it has run one."""
    found: list[device_loop.DeviceLoop] = []
    prepare = device_loop.DeviceLoop._prepare

    def noted(self: device_loop.DeviceLoop, counts: Any) -> None:
        found.append(self)
        prepare(self, counts)

    monkeypatch.setattr(device_loop.DeviceLoop, "_prepare", noted)
    return found


def both(
    net: nn.Module, x: Tensor, made: list[device_loop.DeviceLoop], method: str = "synflow",
    rounds: int = 4, **options: Any,
) -> tuple[pk.MaskSet, pk.MaskSet]:  # fmt: skip
    options = {"sparsity": 0.9, "example_inputs": x, "apply": False, "rounds": rounds, **options}
    found = pk.prune(net, method, backend="cuda_source", **options)
    assert len(made) == 1
    return found, pk.prune(net, method, **options)


def differing(a: pk.MaskSet, b: pk.MaskSet) -> float:
    return sum(int((a[name] != b[name]).sum()) for name in b) / b.total


@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.filterwarnings("ignore:.*is left out")
@pytest.mark.filterwarnings("ignore:.*reached by no path")
@pytest.mark.parametrize("name", NETS)
def test_masks_and_paths_of_a_run(name: str, made: list[device_loop.DeviceLoop]) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]()
    found, wanted = both(net, x, made)
    assert found.kept == wanted.kept
    assert differing(found, wanted) <= 1e-3  # scores are rounded in another order
    for a, b in zip(found.metadata["history"], wanted.metadata["history"], strict=True):
        assert a["log_flow"] == pytest.approx(b["log_flow"], abs=1e-3)


@pytest.mark.parametrize("method", ["synflow", "synflow_l2"])
@pytest.mark.parametrize("scope", ["global", "local", "erk"])
def test_scopes_and_powers(method: str, scope: str, made: list[device_loop.DeviceLoop]) -> None:
    torch.manual_seed(1)
    net = pk.zoo.create("mlp", sizes=(31, 33, 1, 8))
    found, wanted = both(net, torch.ones(1, 31), made, method, scope=scope, sparsity=0.6)
    assert found.kept_by_layer == wanted.kept_by_layer
    assert differing(found, wanted) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights(dtype: torch.dtype, made: list[device_loop.DeviceLoop]) -> None:
    torch.manual_seed(2)
    net = pk.zoo.create("mlp", sizes=(40, 50, 10)).to(dtype)
    found, wanted = both(net, torch.ones(1, 40, dtype=dtype), made)
    assert differing(found, wanted) <= 1e-3


@pytest.mark.parametrize("stored_from", [1, 10**9])
def test_scores_that_are_stored_and_made_again(
    stored_from: int, made: list[device_loop.DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(9)
    monkeypatch.setattr(device_loop, "SCORES_STORED_FROM", stored_from)
    net, x = NETS["plain"]()
    found, wanted = both(net, x, made)
    stored = sum(scores is not None for scores in made[0]._scores)
    assert stored == (len(found) if stored_from == 1 else 0)
    assert differing(found, wanted) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["synflow", "synflow_l2"])
def test_sweeps_meet_the_scores(
    method: str,
    dtype: torch.dtype,
    made: list[device_loop.DeviceLoop],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The selection of most rounds needs no read of its own, and the masks stay what they were."""
    torch.manual_seed(10)
    monkeypatch.setattr(device_loop, "MET_FROM", 0)
    net = pk.zoo.create("mlp", sizes=(40, 64, 96, 200, 10)).to(dtype)
    x = torch.ones(1, 40, dtype=dtype)
    found, wanted = both(net, x, made, method, rounds=20, sparsity=0.95)
    assert differing(found, wanted) <= 1e-3
    assert made[0].stream is not None
    assert settled_rounds(made[0].stream) >= 12
    monkeypatch.setattr(device_loop, "MET_FROM", 10**9)
    read = pk.prune(
        net, method, backend="cuda_source", rounds=20, sparsity=0.95, example_inputs=x, apply=False
    )
    assert made[1].stream is None
    assert all(torch.equal(found.packed(n), read.packed(n)) for n in read)


@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_a_band_that_misses_costs_a_read(
    schedule: str, made: list[device_loop.DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of weights far apart: the k-th score jumps in the middle of the run."""
    torch.manual_seed(11)
    monkeypatch.setattr(device_loop, "MET_FROM", 0)
    net = pk.zoo.create("mlp", sizes=(16, 64, 64, 16))
    for m in net.modules():
        if isinstance(m, nn.Linear):
            m.weight.data = torch.where(torch.rand(m.weight.shape) < 0.4, 1e-6, 1.0) * m.weight
    options: dict[str, Any] = {"schedule": schedule, "rounds": 16, "sparsity": 0.9}
    found, wanted = both(net, torch.ones(1, 16), made, **options)
    assert differing(found, wanted) <= 1e-3
    assert made[0].stream is not None
    assert 0 < settled_rounds(made[0].stream) < 14


def test_nan_under_a_sweep_that_meets_scores(
    made: list[device_loop.DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that becomes NaN while rounds run is named by the parameter, not kept in silence."""
    torch.manual_seed(12)
    monkeypatch.setattr(device_loop, "MET_FROM", 0)
    net = pk.zoo.create("mlp", sizes=(16, 64, 64, 8))
    layer = [m for m in net.modules() if isinstance(m, nn.Linear)][1]
    turn, calls = device_loop.DeviceLoop._round, 0

    def spoiled(self: device_loop.DeviceLoop, parity: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            layer.weight.data.fill_(float("nan"))
        turn(self, parity)

    monkeypatch.setattr(device_loop.DeviceLoop, "_round", spoiled)
    with pytest.raises(NonFiniteScoreError, match=r"layers.*\.weight"):
        pk.prune(
            net, "synflow", backend="cuda_source", rounds=12, sparsity=0.9,
            example_inputs=torch.ones(1, 16), apply=False,
        )  # fmt: skip
    assert calls >= 9


def test_runs_are_equal_bit_for_bit(made: list[device_loop.DeviceLoop]) -> None:
    torch.manual_seed(4)
    net, x = NETS["branches"]()
    options: dict[str, Any] = {"sparsity": 0.8, "example_inputs": x, "rounds": 5, "apply": False}
    first = pk.prune(net, "synflow", backend="cuda_source", **options)
    again = pk.prune(net, "synflow", backend="cuda_source", **options)
    assert len(made) == 2
    assert all(torch.equal(first.packed(n), again.packed(n)) for n in first)
    assert first.metadata["history"] == again.metadata["history"]


def test_one_launch_a_sweep_gives_the_same_bits(
    made: list[device_loop.DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All instructions by one kernel that waits between them, and one launch each."""
    torch.manual_seed(5)
    net, x = NETS["branches"]()
    options: dict[str, Any] = {"sparsity": 0.8, "example_inputs": x, "rounds": 3, "apply": False}
    apart = pk.prune(net, "synflow", backend="cuda_source", **options)
    monkeypatch.setattr(cuda_flow.Instruction, "blocks", lambda self: 1)
    joined = pk.prune(net, "synflow", backend="cuda_source", **options)
    table = made[1]._program.table
    with pk_kernels(made[1]):
        assert len(table.steps(0, 0, made[1]._swept)) == 1
    assert all(torch.equal(apart.packed(n), joined.packed(n)) for n in apart)


def pk_kernels(loop: device_loop.DeviceLoop) -> Any:
    return device_loop.cuda_launch.provided(loop._provider)


def test_blocks_that_wait_for_each_other_are_refused_here(on_cpu: shim.OnCpu) -> None:
    with device_loop.cuda_launch.provided(on_cpu):
        table = cuda_flow.FlowTable(torch.zeros(1), 1, False)
        for _ in range(2):
            out = torch.zeros(5)
            table.add(cuda_flow.Instruction(cuda_flow.FILL, out, table.slot()))
        table.finish(1)
        step = table.steps(0, 0, 2)[0]
        device_loop.cuda_launch.run(out, [step])
        assert out.tolist() == [1.0] * 5
        with pytest.raises(RuntimeError, match="grid barrier"):
            device_loop.cuda_launch.run(out, [step._replace(blocks=2)])


def test_dead_networks_name_the_layer(made: list[device_loop.DeviceLoop]) -> None:
    net = pk.zoo.create("mlp", sizes=(8, 8, 8, 4))
    weights = [m for m in net.modules() if isinstance(m, nn.Linear)]
    weights[1].weight.data.zero_()
    with pytest.raises(PaikernError, match="no path") as found:
        both(net, torch.ones(1, 8), made)
    with pytest.raises(PaikernError) as wanted:
        pk.prune(net, "synflow", sparsity=0.9, example_inputs=torch.ones(1, 8), rounds=4)
    assert str(found.value) == str(wanted.value)


def test_overflow_names_the_parameter(made: list[device_loop.DeviceLoop]) -> None:
    net = pk.zoo.create("mlp", sizes=(64, 64, 4))
    for m in net.modules():
        if isinstance(m, nn.Linear):
            m.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteScoreError) as found:
        both(net, torch.ones(1, 64), made)
    with pytest.raises(NonFiniteScoreError) as wanted:
        pk.prune(net, "synflow", sparsity=0.9, example_inputs=torch.ones(1, 64), rounds=4)
    assert str(found.value) == str(wanted.value)


def test_an_emptied_layer_stops_the_run(made: list[device_loop.DeviceLoop]) -> None:
    torch.manual_seed(6)
    net = pk.zoo.create("mlp", sizes=(30, 30, 30, 4))
    options: dict[str, Any] = {
        "sparsity": 0.999, "example_inputs": torch.ones(1, 30), "rounds": 1, "apply": False,
        "on_collapse": "raise",
    }  # fmt: skip
    with pytest.raises(PaikernError) as found:
        pk.prune(net, "synflow", backend="cuda_source", **options)
    assert len(made) == 1
    with pytest.raises(PaikernError) as wanted:
        pk.prune(net, "synflow", **options)
    assert str(found.value) == str(wanted.value)


def test_a_layer_without_paths_is_pruned_first(made: list[device_loop.DeviceLoop]) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)
            self.unused = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    torch.manual_seed(7)
    with pytest.warns(pk.PaikernWarning):
        found, wanted = both(Unused(), torch.ones(1, 8), made, sparsity=0.7)
    assert found.kept_by_layer == wanted.kept_by_layer


@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.filterwarnings("ignore:.*is left out")
@pytest.mark.parametrize("name", [*(n for n in NETS if n not in ("deep", "llama")), "offsets"])
def test_the_published_variant(name: str, made: list[device_loop.DeviceLoop]) -> None:
    """Biases, offsets of norms, thresholds: values may be negative."""
    torch.manual_seed(13)
    net, x = (offsets(), torch.ones(1, 3, 8, 8)) if name == "offsets" else NETS[name]()
    found, wanted = both(net, x, made, variant="published")
    assert found.kept == wanted.kept
    assert differing(found, wanted) <= 1e-3
    for a, b in zip(found.metadata["history"], wanted.metadata["history"], strict=True):
        assert a["log_flow"] == pytest.approx(b["log_flow"], abs=1e-3)


def offsets() -> nn.Module:
    """Norms whose means and biases push values below 0, with and without ReLU behind them."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 10), nn.BatchNorm1d(10), nn.Linear(10, 4),
    )  # fmt: skip
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.uniform_(-3.0, 3.0)
            m.running_var.uniform_(0.2, 2.0)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.weight)
    return net.eval()


@pytest.mark.filterwarnings("ignore:layer collapse")
def test_budgets_of_fused_projections_run_by_operations(
    made: list[device_loop.DeviceLoop],
) -> None:
    """Ranked by the rows that steps use, they would have no budget of their own."""
    torch.manual_seed(8)
    net, x = Rows(8), torch.ones(1, 16)
    options: dict[str, Any] = {
        "sparsity": 0.5, "example_inputs": x, "rounds": 2, "apply": False, "scope": "local",
    }  # fmt: skip
    found = pk.prune(net, "synflow", backend="cuda_source", **options)
    assert not made
    wanted = pk.prune(net, "synflow", **options)
    assert found.kept_by_layer == wanted.kept_by_layer
    assert differing(found, wanted) <= 1e-3


def test_the_plan_for_a_card_of_132_multiprocessors() -> None:
    """Kernels that wait for each other have blocks that fit on the card at the same time."""

    class Card:
        def run(self, steps: Any, device: int, stream: int) -> None: ...

        def multiprocessors(self, device: int) -> int:
            return 132

        def together(self, device: int, each: int) -> int:
            return 132 * each

    kernels: list[str] = []
    for name, x in (("vgg16_bn", torch.ones(1, 3, 32, 32)), ("resnet20", torch.ones(1, 3, 32, 32))):
        net = pk.zoo.create(name).eval()
        state = dict(net.named_parameters()) | dict(net.named_buffers())
        with device_loop.cuda_launch.provided(Card()):
            flow = Flow(trace(net, x), Semantics(1, "scale"))
            program = DeviceProgram(flow, state, {}, "scores", 1)
            program.finish()
            count = len(program.table.instructions)
            steps = program.table.steps(0, 0, count)
        assert all(0 < s.blocks <= 132 for s in steps if s.kernel == "paikern_flow")
        joined = sum(s.arguments[2] - s.arguments[1] for s in steps if s.kernel == "paikern_flow")
        assert joined + sum(s.kernel != "paikern_flow" for s in steps) == count
        kernels += [s.kernel for s in steps]
    assert {"paikern_flow", "paikern_path_conv_forward", "paikern_flow_small"} <= set(kernels)


def test_threads_take_turns(
    made: list[device_loop.DeviceLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grids whose blocks wait for each other are never on a card together."""
    free: list[bool] = []

    def look() -> None:
        free.append(device_loop.cuda_launch.ALONE.acquire(blocking=False))

    def watched(self: device_loop.DeviceLoop, parity: int) -> None:
        other = threading.Thread(target=look)
        other.start()
        other.join()
        turn(self, parity)

    turn = device_loop.DeviceLoop._round
    monkeypatch.setattr(device_loop.DeviceLoop, "_round", watched)
    torch.manual_seed(14)
    both(*NETS["mlp"](), made)
    assert free == [False] * 4
    assert device_loop.cuda_launch.ALONE.acquire(blocking=False)
    device_loop.cuda_launch.ALONE.release()


def test_log_total_of_a_record() -> None:
    none = cuda_flow.Record(0.0, 0, 3, -1, -1, 0, 0, 0, 0)
    assert device_loop.log_total(none) == -math.inf
    assert device_loop.log_total(none._replace(mantissa=1.5, top=300)) == pytest.approx(
        math.log(1.5) + 300 * math.log(2)
    )
