"""PX against its definition: worked example, autograd of f, g and h, and every single path."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import paikern as pk
from bench.references.px import px as reference
from paikern import zoo
from paikern.errors import PaikernError
from python_tests.oracles import goldens
from python_tests.oracles.px import px_by_paths, px_scores
from python_tests.scorers.helpers import agreement

COLLAPSE = "ignore:layer collapse:paikern.errors.PaikernWarning"


class Residual(nn.Module):
    """Padding, stride, groups, a norm, a 1x1 shortcut, a max pool and a mean."""

    def __init__(self, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.short = nn.Conv2d(8, 8, 1, stride=2, bias=False)
        self.pool = nn.MaxPool2d(2) if pool is None else pool
        self.wide = nn.Conv2d(8, 12, 3, padding=2, dilation=2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.down(x) + self.short(x))
        x = self.relu(self.wide(self.pool(x)))
        return self.head(self.mean(x).flatten(1))


class Flat(nn.Module):
    """A convolution without padding, a strided one, a max pool that overlaps, and a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 5)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.b = nn.Conv2d(6, 7, (3, 2), stride=(1, 2), padding=(1, 0))
        self.head = nn.Linear(7 * 6 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.a(x)))
        return self.head(self.relu(self.b(x)).flatten(1))


def prepared(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and offsets, as after some training; in training mode, as users have it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model.train()


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))
    images = torch.randn(7, 3, 15, 15)
    return {
        "mlp": (mlp, torch.randn(7, 6)),
        "residual": (prepared(Residual()), images),
        "flat": (prepared(Flat()), images),
        "resnet20": (prepared(zoo.create("resnet20", seed=1)), torch.randn(3, 3, 32, 32)),
    }


MODELS = models()


def some_masks(model: nn.Module, density: float, seed: int = 3) -> pk.MaskSet:
    generator = torch.Generator().manual_seed(seed)
    shapes = pk.score(model, "magnitude").shapes
    bits = {n: torch.rand(shape, generator=generator) < density for n, shape in shapes.items()}
    return pk.MaskSet.from_bool(bits)


def relative(scores: pk.Scores) -> dict[str, Tensor]:
    top = scores.exponent
    return {n: scores.dense(n, torch.float64, relative_to=top) for n in scores}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    """Equal up to one common factor and up to rounding of the largest score of a layer."""
    a, b = (
        sum(float(t.sum()) for t in found.values()),
        sum(float(t.sum()) for t in expected.values()),
    )
    for name, values in expected.items():
        torch.testing.assert_close(
            found[name] / a, values / b, rtol=rtol, atol=rtol * float(values.max()) / b
        )


def worked_example() -> tuple[nn.Module, pk.MaskSet]:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for layer, values in zip((model[0], model[2]), goldens.PATH_WEIGHTS, strict=True):
            layer.weight.copy_(torch.tensor(values))
    kept = {"0.weight": torch.ones(2, 3).bool(), "2.weight": torch.tensor([[1, 0], [1, 1]]).bool()}
    return model, pk.MaskSet.from_bool(kept)


def test_worked_example() -> None:
    model, masks = worked_example()
    scores = pk.score(model, "px", data=torch.ones(1, 3), masks=masks)
    first = torch.tensor([[3, 12, 0.75], [0, 432, 48]])
    second = torch.tensor([[0, 0], [15.75, 480]])
    assert torch.equal(scores.dense("0.weight"), first)
    # A pruned weight is marked as one that may not return; its score is 0.
    assert torch.equal(scores.dense("2.weight").clamp(min=0), second)
    assert float(first.sum()) == float(second.sum()) == 495.75


@pytest.mark.parametrize("density", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "default"])
def test_against_autograd(name: str, density: float, backend: str | None) -> None:
    model, x = MODELS[name]
    masks = some_masks(model, density)
    scores = pk.score(model, "px", data=x, masks=masks, monotone=False, backend=backend)
    _, expected = px_scores(model, x, {n: masks[n] for n in masks})
    close(relative(scores), expected, 1e-4)


def test_float64() -> None:
    model, x = MODELS["residual"]
    wide = prepared(Residual()).double()
    wide.load_state_dict(model.state_dict())
    masks = some_masks(model, 0.5)
    scores = pk.score(wide, "px", data=x.double(), masks=masks, monotone=False, norm="identity")
    _, expected = px_scores(wide, x, {n: masks[n] for n in masks}, norm="identity")
    close(relative(scores), expected, 1e-6)  # scores are handed over in float32


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_against_every_path(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layers = [torch.randn(b, a, generator=generator) for a, b in itertools.pairwise(widths)]
    masks = [torch.rand(w.shape, generator=generator) < 0.7 for w in layers]
    x = torch.randn(3, widths[0], generator=generator)
    expected = px_by_paths(layers, masks, x)
    parts: list[nn.Module] = []
    for w in layers:
        parts += [nn.Linear(w.shape[1], w.shape[0], bias=False), nn.ReLU()]
        parts[-2].weight.data = w.clone()
    model = nn.Sequential(*parts[:-1])
    names = [f"{2 * i}.weight" for i in range(len(layers))]
    kept = pk.MaskSet.from_bool(dict(zip(names, masks, strict=True)))
    if not any(bool(score.any()) for score in expected):
        with pytest.raises(PaikernError):
            pk.score(model, "px", data=x, masks=kept)
        return
    scores = pk.score(model, "px", data=x, masks=kept, monotone=False)
    close(relative(scores), dict(zip(names, expected, strict=True)), 1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_dense_mask_ranks_as_synflow_l2(name: str) -> None:
    model, x = MODELS[name]
    scores = pk.score(model, "px", data=x)
    other = pk.score(model, "synflow_l2", example_inputs=x)
    for layer in scores:
        assert torch.equal(scores.dense(layer), other.dense(layer))
    _, expected = px_scores(model, x)  # from all samples, nothing left out
    close(relative(other), expected, 1e-4)


def test_classifier_left_dense_ranks_as_synflow_l2() -> None:
    model, x = MODELS["residual"]
    options: dict[str, Any] = {"sparsity": 0.7, "rounds": 5, "ignore": "head", "apply": False}
    found = pk.prune(model, "px", data=x, **options)
    other = pk.prune(model, "synflow_l2", example_inputs=x, **options)
    assert all(torch.equal(found[n], other[n]) for n in found)


def test_coupling_by_product_ranks_as_synflow_l2() -> None:
    model, x = MODELS["mlp"]
    masks = some_masks(model, 0.5)
    found = pk.score(model, "px", data=x, masks=masks, coupling="product")
    other = pk.score(model, "synflow_l2", example_inputs=x, masks=masks)
    assert all(torch.equal(found.dense(n), other.dense(n)) for n in found)


@pytest.mark.parametrize("name", ["mlp", "flat"])
def test_scores_of_a_cut_add_up_to_one_number(name: str) -> None:
    model, x = MODELS[name]
    scores = pk.score(model, "px", data=x, masks=some_masks(model, 0.5), monotone=False)
    sums = [float(t.sum()) for t in relative(scores).values()]
    assert sums == pytest.approx([sums[0]] * len(sums), rel=1e-5)


@pytest.mark.filterwarnings(COLLAPSE)
@pytest.mark.parametrize("rounds", [1, 4, 12])
def test_whole_run_equals_the_plain_loop(rounds: int) -> None:
    torch.manual_seed(2)
    model = prepared(Residual()).double()
    x = torch.randn(10, 3, 15, 15, dtype=torch.float64)
    found = pk.prune(model, "px", sparsity=0.8, rounds=rounds, data=x, apply=False)
    expected = reference(model, [x[:6], x[6:]], 0.8, rounds, selection="exact", dtype=torch.float64)
    assert agreement({n: found[n] for n in found}, expected) == 1.0
    alone = reference(model, [x], 0.8, rounds, selection="exact", dtype=torch.float64, one_h=True)
    assert agreement(alone, expected) == 1.0


@pytest.mark.filterwarnings(COLLAPSE)
def test_float32_run_is_near_the_float64_run() -> None:
    torch.manual_seed(2)
    model = prepared(Residual())
    x = torch.randn(10, 3, 15, 15)
    found = pk.prune(model, "px", sparsity=0.8, rounds=10, data=x, apply=False)
    wide = pk.prune(model.double(), "px", sparsity=0.8, rounds=10, data=x.double(), apply=False)
    assert agreement({n: found[n] for n in found}, {n: wide[n] for n in wide}) > 0.995


@pytest.mark.parametrize("backend", ["reference", None], ids=["reference", "default"])
def test_batches_add_up(backend: str | None) -> None:
    model, x = MODELS["residual"]
    masks = some_masks(model, 0.4)
    y = torch.arange(len(x))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    options: dict[str, Any] = {"masks": masks, "backend": backend, "monotone": False}
    whole = pk.score(model, "px", data=x, **options)
    for data in (loader, [x[:2], x[2:]], (x, y), iter([(x[:5], y[:5]), (x[5:], y[5:])])):
        parts = pk.score(model, "px", data=data, **options)
        close(relative(parts), relative(whole), 1e-5)
    split = pk.score(model, "px", data=x, batch_size=2, **options)
    close(relative(split), relative(whole), 1e-5)


def test_threads_do_not_change_a_bit() -> None:
    model, x = MODELS["resnet20"]
    x = torch.cat([x, -x, x.flip(0)])
    masks = some_masks(model, 0.3)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(pk.score(model, "px", data=x, masks=masks))
    finally:
        torch.set_num_threads(threads)
    assert found[0].exponent == found[1].exponent
    assert all(torch.equal(found[0].dense(n), found[1].dense(n)) for n in found[0])


def test_pool_gate() -> None:
    """Where x**2 has its maximum elsewhere than the model, the two rules count other paths."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.MaxPool2d((1, 2)), nn.ReLU(),
                          nn.Flatten(), nn.Linear(2, 2, bias=False))  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        model[4].weight.fill_(1.0)
    x = torch.tensor([[[[-3.0, 2.0]]]])  # channel 0 is largest at 2, channel 1 at -3
    masks = {n: torch.ones(s).bool() for n, s in pk.score(model, "magnitude").shapes.items()}
    masks["4.weight"] = torch.eye(2).bool()  # c_0 from channel 0, c_1 from channel 1
    for backend in ("reference", None):
        for gate, c in ((False, (9.0, 9.0)), (True, (4.0, 9.0))):
            scores = pk.score(
                model, "px", data=x, masks=pk.MaskSet.from_bool(masks), pool_gate=gate,
                backend=backend,
            )  # fmt: skip
            assert torch.equal(scores.dense("4.weight").diagonal(), torch.tensor(c)), (
                backend,
                gate,
            )


@pytest.mark.filterwarnings(COLLAPSE)
def test_pruned_weights_stay_pruned() -> None:
    model, x = MODELS["residual"]
    kept: list[pk.MaskSet] = []
    for rounds in (1, 2, 3):
        densities = 0.5**rounds
        masks = None if not kept else kept[-1]
        scores = pk.score(model, "px", data=x, masks=masks)
        kept.append(pk.select(scores, density=densities))
    for before, after in itertools.pairwise(kept):
        assert not any(bool((after[n] & ~before[n]).any()) for n in after)


def test_history_holds_the_total() -> None:
    model, _ = worked_example()
    found = pk.prune(model, "px", sparsity=0.5, data=torch.ones(1, 3), rounds=2, apply=False)
    assert [row["round"] for row in found.metadata["history"]] == [1, 2]
    assert found.metadata["history"][0]["log_flow"] == pytest.approx(math.log(196.25))


def test_model_is_unchanged_also_by_an_error() -> None:
    model, x = MODELS["residual"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pk.score(model, "px", data=x, masks=some_masks(model, 0.5))
    broken = [x[:2], x[2:4], torch.full_like(x[:1], math.nan)]
    with pytest.raises(ValueError, match="NaN"):
        pk.score(model, "px", data=broken, masks=some_masks(model, 0.5), example_inputs=x[:1])
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_gate_shut() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    with pytest.raises(PaikernError, match="use other or more samples"):
        pk.score(model, "px", data=torch.ones(2, 3))


class SelfGated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(x * torch.relu(x))


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.GELU(), "gelu"), (nn.LeakyReLU(), "leaky_relu"), (nn.Tanh(), "tanh"),
     (nn.SiLU(), "silu"), (nn.Softmax(1), "softmax"), (nn.Hardtanh(), "hardtanh")],
    ids=["gelu", "leaky_relu", "tanh", "silu", "softmax", "hardtanh"],
)  # fmt: skip
def test_other_activations_are_refused(activation: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), activation, nn.Linear(4, 2))
    with pytest.raises(PaikernError, match=f"px: {name} in '3' has no ReLU-like gate.*nn.ReLU"):
        pk.score(model, "px", data=torch.ones(2, 3))


def test_product_of_activations_is_refused() -> None:
    with pytest.raises(PaikernError, match="product of two activations"):
        pk.score(SelfGated(), "px", data=torch.ones(2, 3))


class Functional(nn.Module):
    """What a path graph leaves out or only says in part: ReLU6, an added parameter, a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.relu6 = nn.ReLU6()
        self.position = nn.Parameter(torch.full((4,), 0.7))
        self.scale = nn.Parameter(torch.full((8,), -2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.a(x) * 4)
        x = torch.cat([x[:, :2], x[:, 6:]], 1) + self.position
        return self.c(torch.relu(self.b(x) * self.scale))


def test_functional_models() -> None:
    torch.manual_seed(5)
    model, x = Functional(), torch.randn(9, 6)
    masks = some_masks(model, 0.6)
    w = {n: p.detach().double() for n, p in model.named_parameters()}
    m = {n: masks[n].double() for n in masks}

    def forward(x: Tensor, gates: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """f without gates, g with them."""
        path = gates is not None
        linear = {n: m[f"{n}.weight"] * (1 if path else w[f"{n}.weight"]) for n in "abc"}
        bias = {n: 0 if path else w[f"{n}.bias"] for n in "abc"}
        y = (x @ linear["a"].T + bias["a"]) * 4
        first = gates[0] if gates else y > 0
        y = y * first if path else y.clamp(0, 6)
        y = torch.cat([y[:, :2], y[:, 6:]], 1) + (0 if path else w["position"])
        y = (y @ linear["b"].T + bias["b"]) * (1 if path else w["scale"])
        second = gates[1] if gates else y > 0
        return (y * second) @ linear["c"].T + bias["c"], [first, second]

    _, gates = forward(x.double(), None)
    c = forward(x.double() ** 2, gates)[0].sum(0)
    scores = relative(pk.score(model, "px", data=x, masks=masks, monotone=False))["c.weight"]
    plain = pk.score(model, "synflow_l2", example_inputs=x, masks=masks, monotone=False)
    expected = relative(plain)["c.weight"] * c[:, None]
    torch.testing.assert_close(scores / scores.sum(), expected / expected.sum())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data: method 'px' reads samples"),
        (torch.ones(0, 3), "no sample"),
        ([], "no sample"),
        (torch.ones(2, 4), "could not be traced|samples of shape"),
        ([torch.ones(2, 3), torch.ones(2, 5)], "samples of shape \\(5,\\)"),
        (torch.tensor([[1.0, math.inf, 0.0]]), "infinite"),
        (torch.ones(2, 3, dtype=torch.int64), "floating"),
        ("train", "got str"),
        ([{"x": torch.ones(2, 3)}], "got dict"),
    ],
)
def test_bad_data(data: Any, message: str) -> None:
    model, masks = worked_example()
    with pytest.raises(ValueError, match=message):
        pk.score(model, "px", data=data, example_inputs=torch.ones(1, 3), masks=masks)


def test_bad_options() -> None:
    model, _ = worked_example()
    with pytest.raises(ValueError, match="coupling must be"):
        pk.score(model, "px", data=torch.ones(1, 3), coupling="sum")
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        pk.score(model, "px", data=torch.ones(1, 3), batch_size=0)
    with pytest.raises(ValueError, match="no 'published' variant"):
        pk.score(model, "px", data=torch.ones(1, 3), variant="published")


def test_methods_table() -> None:
    row = next(row for row in pk.methods() if row["name"] == "px")
    assert row["needs_data"]
    assert row["rounds"] == 100
    inherited = {"norm", "monotone", "conv"}
    assert set(row["options"]) == {"coupling", "pool_gate", "batch_size"} | inherited
