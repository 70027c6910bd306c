"""Rounds in native code against the same rounds scored and selected one by one from Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern import ops, zoo
from paikern import rounds as paikern_rounds
from paikern.scorers import Run, path_loop
from paikern.scorers.path_loop import PathLoop
from paikern.scorers.px import PX
from paikern.scorers.synflow import PathScorer

pytestmark = pytest.mark.filterwarnings("ignore:layer collapse:paikern.errors.PaikernWarning")

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "synflow": ("synflow", {}),
    "synflow-published": ("synflow", {"variant": "published"}),
    "synflow-identity": ("synflow", {"norm": "identity"}),
    "synflow-shift": ("synflow", {"conv": "shift_invariant"}),
    "l2a": ("synflow_l2", {}),
    "l2b": ("synflow_l2", {"definition": "b"}),
    "l2c": ("synflow_l2", {"definition": "c"}),
    "px": ("px", {}),
}


class Mixed(nn.Module):
    """Plain, grouped, strided, transposed and 1x1 convolutions, a shortcut, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.down = nn.Conv2d(24, 40, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(40, 24, 4, stride=2, padding=1, groups=2)
        self.short = nn.Conv2d(24, 24, 1, bias=False)
        self.few = nn.Conv2d(24, 48, 3, stride=3, padding=1)
        self.hidden, self.head = nn.Linear(48, 31), nn.Linear(31, 10)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.grouped(x)) + self.short(x)
        x = self.pool(self.relu(self.up(self.relu(self.down(x)))))
        x = self.relu(self.few(x)).mean((2, 3))
        y: Tensor = self.head(self.relu(self.hidden(x)))
        return y


def chain() -> nn.Module:
    """Linear layers alone: every score is a product of two vectors."""
    return zoo.create("mlp", sizes=[40, 300, 210, 50, 10], seed=1)


def mixed() -> nn.Module:
    torch.manual_seed(2)
    net = Mixed()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
        net.norm.running_var.uniform_(0.5, 2.0)
    return net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (chain, (40,)),
    "mixed": (mixed, (3, 12, 12)),
    "resnet20": (lambda: zoo.create("resnet20", seed=0), (3, 32, 32)),
}


def prune(
    model: nn.Module, method: str, shape: tuple[int, ...], **options: Any
) -> tuple[pk.MaskSet, list[PathLoop]]:
    """The masks and the native loops of a run."""
    loops: list[PathLoop] = []

    def kept(cls: type[PathScorer]) -> Callable[[PathScorer, Run], PathLoop | None]:
        make = cls.loop

        def loop(self: PathScorer, run: Run) -> PathLoop | None:
            made = make(self, run)
            if made is not None:
                loops.append(made)
            return made

        return loop

    if method == "px":
        samples = torch.randn(5, *shape, generator=torch.Generator().manual_seed(3))
        options = {"data": samples.to(next(model.parameters()).dtype), **options}
    else:
        x = torch.ones(1, *shape, dtype=next(model.parameters()).dtype)
        options = {"example_inputs": x, **options}
    with pytest.MonkeyPatch.context() as patch:
        for cls in (PathScorer, PX):
            patch.setattr(cls, "loop", kept(cls))
        found = pk.prune(model, method, apply=False, progress=False, **options)
    return found, loops


def by_python(model: nn.Module, method: str, shape: tuple[int, ...], **options: Any) -> pk.MaskSet:
    """The same without a native loop."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (PathScorer, PX):
            patch.setattr(cls, "loop", lambda self, run: None)
        found, loops = prune(model, method, shape, **options)
    assert not loops
    return found


def assert_same(a: pk.MaskSet, b: pk.MaskSet) -> None:
    assert list(a) == list(b)
    assert {n: int((a[n] != b[n]).sum()) for n in a} == dict.fromkeys(a, 0)
    rows = zip(a.metadata["history"], b.metadata["history"], strict=True)
    for one, other in rows:
        assert one["round"] == other["round"]
        assert one["density"] == other["density"]
        assert one["log_flow"] == pytest.approx(other["log_flow"], abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("network", NETWORKS)
def test_masks_are_those_of_single_rounds(network: str, name: str) -> None:
    make, shape = NETWORKS[network]
    method, options = METHODS[name]
    options = {"sparsity": 0.9, "rounds": 12, **options}
    found, loops = prune(make(), method, shape, **options)
    assert len(loops) == 1
    assert_same(found, by_python(make(), method, shape, **options))


@pytest.mark.parametrize("network", ["chain", "mixed"])
@pytest.mark.parametrize("scope", ["global", "erk", "local"])
@pytest.mark.parametrize("schedule", ["exponential", "linear", "cubic", "expinv"])
def test_budgets_and_schedules(network: str, scope: str, schedule: str) -> None:
    make, shape = NETWORKS[network]
    options = {"sparsity": 0.85, "rounds": 9, "scope": scope, "schedule": schedule}
    for method in ("synflow", "px"):
        found, loops = prune(make(), method, shape, **options)
        assert len(loops) == 1
        assert_same(found, by_python(make(), method, shape, **options))
        streamed = loops[0].native.streamed
        assert (streamed == 0) if scope != "global" else (0 < streamed < 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(dtype: torch.dtype) -> None:
    options = {"sparsity": 0.9, "rounds": 10, "norm": "identity"}
    found, loops = prune(mixed().to(dtype), "synflow", (3, 12, 12), **options)
    assert len(loops) == 1
    assert_same(found, by_python(mixed().to(dtype), "synflow", (3, 12, 12), **options))


@pytest.mark.parametrize("network", NETWORKS)
def test_most_rounds_need_two_reads(network: str) -> None:
    """The first knows nothing of the k-th score, and the forecast of a few may miss."""
    make, shape = NETWORKS[network]
    for method in ("synflow", "synflow_l2"):
        _, loops = prune(make(), method, shape, sparsity=0.95, rounds=60)
        assert 45 <= loops[0].native.streamed <= 59


def densities(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> dict[str, Any]:
    """The options of a run that follows these densities."""
    monkeypatch.setattr(
        paikern_rounds.budget, "schedule_densities", lambda final, rounds, schedule: values
    )
    return {"sparsity": 1 - values[-1], "rounds": len(values)}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["synflow", "synflow_l2", "px"])
def test_counts_that_jump(network: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast that misses costs a read and nothing else."""
    slow = [0.99 - 0.002 * i for i in range(8)]
    options = densities(monkeypatch, [*slow, 0.3, 0.29, 0.28, 0.15])
    make, shape = NETWORKS[network]
    found, loops = prune(make(), method, shape, **options)
    assert_same(found, by_python(make(), method, shape, **options))
    # Beside the first round, the one that jumps from 98 % to 30 % has to miss.
    assert 0 < loops[0].native.streamed <= 10


def test_counts_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that prune nothing, between others that do, and one that keeps everything."""
    options = densities(monkeypatch, [1.0, 0.6, 0.6, 0.6, 0.5, 0.5, 0.3, 0.3, 0.3])
    found, loops = prune(mixed(), "synflow", (3, 12, 12), **options)
    assert_same(found, by_python(mixed(), "synflow", (3, 12, 12), **options))
    assert loops[0].native.streamed <= 8


def test_ties_at_the_threshold() -> None:
    """Weights of one magnitude: thousands tie, and the lower index is kept."""
    net = mixed()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                module.weight.copy_(module.weight.sign() * 0.125)
    for scope in ("global", "erk"):
        options = {"sparsity": 0.7, "rounds": 10, "scope": scope, "norm": "identity"}
        found, loops = prune(net, "synflow", (3, 12, 12), **options)
        assert len(loops) == 1
        assert_same(found, by_python(net, "synflow", (3, 12, 12), **options))


def dead_half() -> nn.Module:
    """Half of the hidden units reach no output: their weights score 0 in every round."""
    net = chain()
    with torch.no_grad():
        net.layers[3].weight[:, :150] = 0.0
    return net


def test_scores_of_zero() -> None:
    """The k-th score is 0 while more is kept than scores, and then it is not."""
    options = {"sparsity": 0.9, "rounds": 40, "schedule": "linear"}
    found, loops = prune(dead_half(), "synflow", (40,), **options)
    assert_same(found, by_python(dead_half(), "synflow", (40,), **options))
    assert loops[0].native.streamed >= 15  # the forecast starts anew once it is positive


def test_a_layer_that_would_keep_nothing() -> None:
    net = zoo.create("resnet20", seed=0)
    for rounds in (1, 6):
        options = {"sparsity": 0.995, "rounds": rounds, "on_collapse": "raise"}
        messages = []
        for run in (prune, by_python):
            with pytest.raises(pk.SparsityError, match="layer collapse") as caught:
                run(net, "synflow", (3, 32, 32), **options)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def threads(counts: tuple[int, ...]) -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("method", "network"),
    [("synflow", "mixed"), ("synflow_l2", "mixed"), ("px", "resnet20")],
)
def test_the_same_bits_for_any_number_of_threads(method: str, network: str) -> None:
    make, shape = NETWORKS[network]
    options = {"sparsity": 0.95, "rounds": 15}
    found = []
    for _ in threads((1, 2, 3)):
        masks, _ = prune(make(), method, shape, **options)
        found.append((masks.digest, [row["log_flow"] for row in masks.metadata["history"]]))
    assert found[0] == found[1] == found[2]


def test_px_through_the_model_is_as_reproducible_as_its_convolutions() -> None:
    """The native f and g do not know every model; PyTorch's convolutions may add in another order.

    On an AMD EPYC they differ by 5e-8 between one thread and two, on Xeons by nothing.
    """
    found = []
    for _ in threads((1, 2, 3)):
        masks, _ = prune(mixed(), "px", (3, 12, 12), sparsity=0.95, rounds=15)
        found.append((masks.kept, [row["log_flow"] for row in masks.metadata["history"]]))
    for kept, log_flow in found[1:]:
        assert kept == found[0][0]
        # log_flow is a logarithm: an absolute error of it is a relative one of the flow.
        assert log_flow == pytest.approx(found[0][1], rel=0, abs=1e-6)


# --- wide layers at high sparsity --------------------------------------------------------------


def wide(channels: int) -> nn.Module:
    """3x3 layers over 4x4 and 2x2 positions, as at the end of a VGG, and a linear layer."""
    torch.manual_seed(4)
    c = channels
    return nn.Sequential(
        nn.Conv2d(3, c // 2, 3, padding=1), nn.ReLU(), nn.Conv2d(c // 2, c, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(c, c, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * c, c), nn.ReLU(), nn.Linear(c, 10),
    )  # fmt: skip


def assert_each_round_is_exact(channels: int, method: str, sparsity: float, rounds: int) -> None:
    """Every mask is the selection from float64 scores under the one before it.

    What differs has a score within float32 rounding of the k-th; the count is exact, and nothing
    that was pruned returns.
    """
    model, x = wide(channels), torch.ones(1, 3, 8, 8)
    seen: list[dict[str, Tensor]] = []
    class_loop = PathScorer.loop

    def loop(self: PathScorer, run: Run) -> PathLoop | None:
        made = class_loop(self, run)
        assert made is not None
        inner = made.rounds

        def rounds(*args: Any, **kwargs: Any) -> Iterator[float]:
            for log_flow in inner(*args, **kwargs):
                seen.append({name: bits.clone() for name, bits in made.masks.items()})
                yield log_flow

        made.rounds = rounds  # type: ignore[method-assign]
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_loop, "_SECONDS_A_CALL", 0.0)  # a call for every round
        patch.setattr(PathScorer, "loop", loop)
        found = pk.prune(
            model, method, sparsity=sparsity, rounds=rounds, example_inputs=x, apply=False,
            progress=False,
        )  # fmt: skip
    assert len(seen) == rounds
    shapes = {name: found[name].shape for name in found}
    assert all(torch.equal(ops.unpack_mask(seen[-1][n], shapes[n]), found[n]) for n in shapes)
    before = {n: torch.ones(shape, dtype=torch.bool) for n, shape in shapes.items()}
    total = sum(mask.numel() for mask in before.values())
    curve = pk.budget.schedule_densities(1 - sparsity, rounds, "exponential")
    for done, packed in enumerate(seen, 1):
        removed = sparsity if done == rounds else 1.0 - curve[done - 1]
        k = pk.budget.keep_count(total, removed)
        state = pk.MaskSet.from_bool(before)
        scores = pk.score(model, method, example_inputs=x, masks=state)
        top = scores.exponent
        values = {n: scores.dense(n, torch.float64, relative_to=top) for n in scores}
        now = {n: ops.unpack_mask(packed[n], shape) for n, shape in shapes.items()}
        assert sum(int(mask.sum()) for mask in now.values()) == k
        assert not any(bool((now[n] & ~before[n]).any()) for n in now)
        kth = float(torch.cat([v.flatten() for v in values.values()]).topk(k).values[-1])
        for n, mask in now.items():
            assert bool((values[n][mask] >= kth * (1 - 2e-5)).all()), (done, n)
            assert bool((values[n][~mask] <= kth * (1 + 2e-5)).all()), (done, n)
        before = now


@pytest.mark.parametrize("method", ["synflow", "synflow_l2"])
def test_wide_layers_round_by_round(method: str) -> None:
    assert_each_round_is_exact(96, method, 0.98, 12)


@pytest.mark.slow
def test_wider_layers_round_by_round() -> None:
    assert_each_round_is_exact(512, "synflow", 0.98, 30)


@pytest.mark.parametrize("channels", [128, 512])
def test_wide_layers_at_high_sparsity(channels: int) -> None:
    """Close to the rounds from Python, equal for any number of threads, and hardly a third read."""
    options = {"sparsity": 0.98, "rounds": 30}
    digests = []
    for _ in threads((1, 2)):
        found, loops = prune(wide(channels), "synflow", (3, 8, 8), **options)
        digests.append(found.digest)
        assert loops[0].native.streamed >= 22
    assert digests[0] == digests[1]
    expected = by_python(wide(channels), "synflow", (3, 8, 8), **options)
    assert found.kept == expected.kept == pk.budget.keep_count(found.total, 0.98)
    differing = sum(int((found[n] != expected[n]).sum()) for n in found)
    assert differing <= 1e-4 * found.kept
    flows = [[row["log_flow"] for row in m.metadata["history"]] for m in (found, expected)]
    assert flows[0] == pytest.approx(flows[1], abs=1e-5)


def test_what_the_native_loop_leaves_to_python() -> None:
    """Tied weights, other selections and methods whose masks may grow have no native rounds."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    for model, options in (
        (Tied(), {}),
        (zoo.create("mlp", sizes=[6, 9, 4], seed=0), {"monotone": False}),
    ):
        found, loops = prune(model, "synflow", (6,), sparsity=0.5, rounds=3, **options)
        assert not loops
        assert found.kept == pk.budget.keep_count(found.total, 0.5)
    for options in ({"selection": "published"}, {"scope": "lamp"}, {"on_collapse": "floor"}):
        _, loops = prune(chain(), "synflow", (40,), sparsity=0.5, rounds=3, **options)
        assert not loops


@pytest.mark.parametrize("method", ["synflow", "px"])
def test_progress_of_native_rounds(method: str) -> None:
    """Every round is reported once, in order, with what it keeps."""
    rows: list[tuple[int, int, dict[str, float]]] = []
    samples = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    given = {"data": samples} if method == "px" else {"example_inputs": samples}
    masks = pk.prune(
        chain(), method, sparsity=0.9, rounds=25, apply=False,
        progress=lambda done, total, values: rows.append((done, total, values)), **given,
    )  # fmt: skip
    assert [row[:2] for row in rows] == [(i, 25) for i in range(1, 26)]
    assert rows[-1][2]["density"] == masks.kept / masks.total
    assert all(math.isfinite(row[2]["log_flow"]) for row in rows)
