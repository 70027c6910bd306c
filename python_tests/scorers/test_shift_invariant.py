"""conv="shift_invariant": on circular networks the scores and masks of conv="exact"."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from paikern import zoo
from paikern.cli import main
from paikern.errors import PaikernWarning
from python_tests.pathgraph.circular_nets import Branches, Gate, circular, circular_nets, norm
from python_tests.scorers.helpers import agreement

#: name, method and options of each member
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "synflow": ("synflow", {}),
    "synflow_l2_a": ("synflow_l2", {}),
    "synflow_l2_b": ("synflow_l2", {"definition": "b"}),
    "synflow_l2_c": ("synflow_l2", {"definition": "c"}),
    "logsynflow": ("logsynflow", {}),
}
VECTORS = {"conv": "shift_invariant"}
SIZE = (1, 3, 16, 16)


def plain() -> nn.Module:
    """Strides 1 and 2, norms, max and average pools, flattened into a linear layer."""
    return nn.Sequential(
        circular(3, 8, 3), norm(8), nn.ReLU(), nn.MaxPool2d(2),
        circular(8, 12, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def residual() -> nn.Module:
    """Branches that add and concatenate, groups, a gate, global average pooling."""
    return nn.Sequential(
        circular(3, 8, 3, stride=2), Branches(8, "add"), norm(8), Branches(8, "cat"),
        circular(16, 8, 3, groups=4), Gate(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip


def circular_resnet20() -> nn.Module:
    model = zoo.create("resnet20", seed=3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    return model


NETS = {"plain": plain, "residual": residual, "resnet20": circular_resnet20}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return NETS[name]().eval()


def log_flow(masks: pk.MaskSet) -> list[float]:
    return [entry["log_flow"] for entry in masks.metadata["history"]]


def prune(model: nn.Module, method: str, x: Tensor, **options: Any) -> pk.MaskSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PaikernWarning)  # of layers that keep nothing
        return pk.prune(model, method, example_inputs=x, apply=False, progress=False, **options)


def assert_same_scores(model: nn.Module, method: str, x: Tensor, **options: Any) -> pk.Scores:
    expected = pk.score(model, method, example_inputs=x, **options)
    found = pk.score(model, method, example_inputs=x, **VECTORS, **options)
    top = expected.exponent
    assert list(found) == list(expected)
    for name in expected:
        a = expected.dense(name, torch.float64, relative_to=top)
        b = found.dense(name, torch.float64, relative_to=top)
        a, b = a.clamp(min=0), b.clamp(min=0)  # without the marks of pruned weights
        torch.testing.assert_close(b, a, rtol=1e-5, atol=float(a.max()) * 1e-12)
    return found


@pytest.mark.parametrize("variant", ["paper", "published"])
@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("net", NETS)
def test_scores_on_circular_networks(net: str, member: str, variant: str) -> None:
    """Biases and norm offsets of the published variant are as constant as the rest."""
    method, options = FAMILY[member]
    found = assert_same_scores(build(net), method, torch.ones(SIZE), variant=variant, **options)
    if member != "logsynflow":  # and no score tensor is made
        assert all(isinstance(score, pk.Factored) for score in found.values())


@pytest.mark.parametrize("member", FAMILY)
@pytest.mark.parametrize("net", ["plain", "residual"])
def test_masks_on_circular_networks(net: str, member: str) -> None:
    method, options = FAMILY[member]
    model, x = build(net), torch.ones(SIZE)
    for rounds in (1, 3):
        common = {"sparsity": 0.8, "rounds": rounds, **options}
        expected = prune(model, method, x, **common)
        found = prune(model, method, x, **common, **VECTORS)
        assert log_flow(found) == pytest.approx(log_flow(expected), rel=1e-6)
        assert found == expected
        assert found.metadata["arguments"]["conv"] == "shift_invariant"


@pytest.mark.parametrize("member", ["synflow", "synflow_l2_a", "synflow_l2_c"])
def test_masks_of_a_circular_resnet20(member: str) -> None:
    """Where masks differ, the scores are equal up to rounding: 270,896 have neighbours that near.

    The threshold is the largest score of one round that is pruned.
    """
    method, options = FAMILY[member]
    model, x = build("resnet20"), torch.ones(SIZE)
    common = {"sparsity": 0.8, "rounds": 1, **options}
    expected = prune(model, method, x, **common)
    found = prune(model, method, x, **common, **VECTORS)
    assert found.kept == expected.kept
    assert agreement(found, expected) > 0.9999
    scores = pk.score(model, method, example_inputs=x, **options)
    values = {n: scores.dense(n, torch.float64, relative_to=scores.exponent) for n in scores}
    threshold = max(float(values[n][~expected[n]].max()) for n in values)
    for name in values:
        moved = values[name][found[name] != expected[name]]
        torch.testing.assert_close(moved, torch.full_like(moved, threshold), rtol=1e-5, atol=0)


@given(
    circular_nets(),
    st.sampled_from(list(FAMILY)),
    st.sampled_from(["paper", "published"]),
    st.sampled_from([0.0, 0.4]),
)
@settings(max_examples=30, deadline=None)
def test_random_circular_networks(
    case: tuple[nn.Module, Tensor], member: str, variant: str, sparsity: float
) -> None:
    model, x = case
    method, options = FAMILY[member]
    masks = pk.prune(model, "random", sparsity=sparsity, scope="local", apply=False)
    try:
        pk.score(model, method, example_inputs=x, masks=masks, variant=variant, **options)
    except pk.PaikernError:  # the random mask left no path
        return
    assert_same_scores(model, method, x, masks=masks, variant=variant, **options)


@pytest.mark.parametrize("pattern", ["2:4", "block:4x3", "kernel", "row", "column"])
@pytest.mark.parametrize("net", ["plain", "residual"])
def test_patterns(net: str, pattern: str) -> None:
    """N:M groups run across channels, not across the taps of the matrix that the scores are."""
    model, x = build(net), torch.ones(SIZE)
    options = {"sparsity": 0.5} if pattern != "2:4" else {}
    expected = prune(model, "synflow", x, rounds=2, pattern=pattern, **options)
    found = prune(model, "synflow", x, rounds=2, pattern=pattern, **options, **VECTORS)
    assert found == expected


@pytest.mark.parametrize(
    "options",
    [{"scope": "erk"}, {"scope": "lamp"}, {"selection": "published"}, {"monotone": False}],
)
def test_with_other_options(options: dict[str, Any]) -> None:
    model, x = build("residual"), torch.ones(SIZE)
    expected = prune(model, "synflow", x, sparsity=0.6, rounds=3, **options)
    assert prune(model, "synflow", x, sparsity=0.6, rounds=3, **options, **VECTORS) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_backend_and_dtypes(dtype: torch.dtype) -> None:
    model, x = build("plain").to(dtype).to(memory_format=torch.channels_last), torch.ones(SIZE)
    options = {"sparsity": 0.8, "rounds": 2, **VECTORS}
    found = prune(model, "synflow", x.to(dtype), **options)
    assert agreement(
        found, prune(model, "synflow", x.to(dtype), backend="reference", **options)
    ) > (0.999)


class Shared(nn.Module):
    """One kernel used by two strides, and one by its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = circular(3, 3, 3)
        self.rows = nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).relu())
        weight = self.rows.weight
        y = F.conv2d(x, weight[:3]).mean((2, 3)), 2 * F.conv2d(x, weight[3:]).sum((2, 3))
        return torch.cat(y, 1)


@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_shared_kernels_and_rows_of_kernels(sparsity: float) -> None:
    torch.manual_seed(0)
    model, x = Shared(), torch.ones(1, 3, 8, 8)
    masks = pk.prune(model, "random", sparsity=sparsity, scope="local", apply=False)
    found = assert_same_scores(model, "synflow", x, masks=masks)
    assert isinstance(found["rows.weight"], pk.Dense)
    assert found.dense("rows.weight").shape == (4, 3, 3, 3)
    assert ((found["rows.weight"].values < 0) == ~masks["rows.weight"]).all()


@pytest.mark.parametrize("shape", [(3, 12), (3, 6, 4, 8)])
def test_one_and_three_dimensions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv3d)[len(shape) // 4]
    model = nn.Sequential(
        conv(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        conv(4, 4, 2, stride=2, groups=2), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.ones(1, *shape)
    with torch.no_grad():
        model(x)
    assert_same_scores(model, "synflow", x)


@pytest.mark.parametrize("channels", [3, 4])
def test_what_zero_padding_changes(channels: int) -> None:
    """By hand: ones under a 3x3 kernel of ones meet 9 taps, at a border fewer."""
    model = nn.Conv2d(1, channels, 3, padding=1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.ones(1, 1, 4, 4)
    exact = pk.score(model, "synflow", example_inputs=x).dense("weight")
    assert exact[0, 0].tolist() == [[9, 12, 9], [12, 16, 12], [9, 12, 9]]
    found = pk.score(model, "synflow", example_inputs=x, **VECTORS).dense("weight")
    assert found.tolist() == torch.full((channels, 1, 3, 3), 16.0).tolist()


@pytest.mark.filterwarnings("ignore:layer collapse:paikern.errors.PaikernWarning")
def test_zero_padded_networks_are_close_to_exact() -> None:
    """docs/pathgraph.md has the table; ResNet-20 in one round shares 99 % of what it keeps."""
    model, x = zoo.create("resnet20", seed=0), torch.ones(1, 3, 32, 32)
    exact = prune(model, "synflow", x, sparsity=0.9, rounds=1)
    found = prune(model, "synflow", x, sparsity=0.9, rounds=1, **VECTORS)
    shared = sum(int((exact[name] & found[name]).sum()) for name in exact)
    assert found.kept == exact.kept
    assert 0.97 * exact.kept < shared < exact.kept


def test_masks_do_not_depend_on_the_size_of_the_image() -> None:
    model = zoo.create("resnet20", seed=0)
    options = {"sparsity": 0.5, "rounds": 3, **VECTORS}
    small, large = (prune(model, "synflow", torch.ones(1, 3, n, n), **options) for n in (32, 72))
    assert small == large
    assert log_flow(small) == log_flow(large)


def test_px_on_a_circular_network() -> None:
    """Only h is on vectors; what the data say is computed on whole images."""
    model, data = build("plain"), torch.randn(4, *SIZE[1:])
    masks = pk.prune(model, "random", sparsity=0.3, scope="local", apply=False)
    expected = pk.score(model, "px", data=data, masks=masks)
    found = pk.score(model, "px", data=data, masks=masks, **VECTORS)
    for name in expected:
        torch.testing.assert_close(
            found.dense(name, relative_to=found.exponent),
            expected.dense(name, relative_to=found.exponent).clamp(min=0),
            rtol=1e-5, atol=1e-12,
        )  # fmt: skip


@pytest.mark.parametrize("method", ["synflow", "synflow_l2", "logsynflow"])
def test_bad_values(method: str) -> None:
    for value in ("circular", None, True):
        with pytest.raises(ValueError, match="conv must be 'exact' or 'shift_invariant', got "):
            pk.score(plain(), method, example_inputs=torch.ones(SIZE), conv=value)


def test_where_it_is_listed() -> None:
    options = {row["name"]: row["options"] for row in pk.methods()}
    for method in ("synflow", "synflow_l2", "logsynflow", "px"):
        assert options[method]["conv"] == "exact"
    assert "conv" not in options["dpai"]


def test_from_the_command_line(tmp_path: Any) -> None:
    arguments = "prune --model resnet20 --method synflow --sparsity 0.5 --rounds 2 --quiet"
    out = str(tmp_path / "out")
    assert main([*arguments.split(), "--set", "conv=shift_invariant", "--out", out]) == 0
    masks = pk.load_masks(next((tmp_path / "out").glob("*.safetensors")))
    assert masks.metadata["arguments"]["conv"] == "shift_invariant"
