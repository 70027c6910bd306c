"""The gradient family on networks small enough to check by hand, by differences, or densely."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from paikern.budget import schedule_densities
from paikern.errors import PaikernWarning
from python_tests.gradients.nets import batches, double, make
from python_tests.oracles import gradients as oracle
from python_tests.oracles.goldens import GRADIENT_LOSS, GRADIENT_SCORES, GRADIENT_WEIGHT


def layer(values: Any = GRADIENT_WEIGHT, dtype: torch.dtype = torch.float64) -> nn.Linear:
    weight = torch.tensor(values, dtype=dtype)
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
    with torch.no_grad():
        net.weight.copy_(weight)
    return net


def sample(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.tensor([[1.0, 2.0]], dtype=dtype), torch.tensor([0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("method", "options", "expected"),
    GRADIENT_SCORES,
    ids=[method + "".join(map(str, options)) for method, options, _ in GRADIENT_SCORES],
)
def test_goldens(
    method: str, options: dict[str, float], expected: list[list[float]], dtype: torch.dtype
) -> None:
    net, data = layer(dtype=dtype), sample(dtype)
    assert F.cross_entropy(net(data[0]), data[1]).item() == pytest.approx(GRADIENT_LOSS, rel=1e-6)
    scores = pk.score(net, method, data=data, **options)
    rtol = 1e-9 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        scores.dense("weight", torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=0,
    )
    best = pk.prune(net, method, amount=3, data=data, rounds=1, apply=False, **options)
    at = 1 if method == "grasp_it" else 3  # g**2 ties in the two entries of the second input
    assert best["weight"].flatten().tolist() == [index == at for index in range(4)]


def test_snip_is_the_derivative_by_the_mask() -> None:
    net = make("conv").double()
    x, y = double(batches("conv", 1)[0])
    scores = pk.score(net, "snip", data=(x, y), mode="eval").dense("body.weight", torch.float64)
    net.eval()

    def loss(at: tuple[int, ...], factor: float) -> float:
        held = net.body.weight[at].item()
        with torch.no_grad():
            net.body.weight[at] = held * factor
            value = float(F.cross_entropy(net(x), y))
            net.body.weight[at] = held
        return value

    for at in ((0, 0, 0, 0), (2, 3, 1, 1), (5, 5, 2, 0)):
        slope = (loss(at, 1 + 1e-5) - loss(at, 1 - 1e-5)) / 2e-5
        assert float(scores[at]) == pytest.approx(abs(slope), rel=1e-5)


def flat_product(
    net: nn.Module, data: tuple[Tensor, Tensor], temperature: float
) -> tuple[dict[str, Tensor], Tensor]:
    """The weights and H g of all of them, H built entry by entry."""
    weights = {n: m.weight.detach() for n, m in oracle.weighted_modules(net).items()}
    shapes = [w.shape for w in weights.values()]
    flat = torch.cat([w.flatten() for w in weights.values()])

    def loss(values: Tensor) -> Tensor:
        parts = values.split([math.prod(shape) for shape in shapes])
        given = {n: p.view(s) for n, p, s in zip(weights, parts, shapes, strict=True)}
        return F.cross_entropy(
            torch.func.functional_call(net, given, data[0]) / temperature, data[1]
        )

    assert flat.numel() <= 200
    hessian = torch.autograd.functional.hessian(loss, flat)
    slope = torch.autograd.functional.jacobian(loss, flat)
    return weights, hessian @ slope


@pytest.mark.parametrize(
    ("method", "temperature"), [("grasp", 200.0), ("grasp", 1.0), ("crop", 1.0)]
)
def test_hessian_methods_against_the_dense_hessian(method: str, temperature: float) -> None:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 4))
    net = net.double().eval()
    data = (torch.randn(7, 6).double(), torch.arange(7) % 4)
    weights, product = flat_product(net, data, temperature)
    options = {"temperature": temperature} if method == "grasp" else {}
    scores = pk.score(net, method, data=data, **options)
    flat = torch.cat([scores.dense(n, torch.float64).flatten() for n in weights])
    expected = torch.cat([w.flatten() for w in weights.values()]) * product
    torch.testing.assert_close(
        flat, expected.abs() if method == "crop" else expected, rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_by_differences(temperature: float) -> None:
    net = make("mlp")
    net[1] = nn.Tanh()  # no kinks
    data = batches("mlp")
    exact = pk.score(net, "grasp", data=data, temperature=temperature)
    near = pk.score(net, "grasp", data=data, temperature=temperature, finite_difference=True)
    for name in exact:
        size = float(exact.dense(name, torch.float64).abs().max())
        torch.testing.assert_close(
            near.dense(name, torch.float64), exact.dense(name, torch.float64),
            rtol=1e-3, atol=1e-4 * size,
        )  # fmt: skip
    masks = pk.prune(net, "grasp", sparsity=0.5, data=data, finite_difference=True, apply=False)
    assert masks.metadata["arguments"]["finite_difference"] is True


@pytest.mark.parametrize("name", ["conv", "bert", "gpt2"])
def test_differences_in_models_with_norms_and_attention(name: str) -> None:
    data = batches(name)
    net = make(name)
    exact = pk.score(net, "grasp", data=data)
    near = pk.score(net, "grasp", data=data, finite_difference=True)
    a = torch.cat([exact.dense(n, torch.float64).flatten() for n in exact])
    b = torch.cat([near.dense(n, torch.float64).flatten() for n in near])
    assert float((a - b).norm() / a.norm()) < 1e-4


def test_grasp_keeps_the_scale_of_its_scores_at_any_temperature() -> None:
    net, data = layer(dtype=torch.float32), sample(torch.float32)
    found = pk.score(net, "grasp", data=data, temperature=2e9)
    # Below the smallest float32, about 1e-45: (200 / 2e9)**3 of those of 200.
    expected = torch.tensor(GRADIENT_SCORES[5][2]) * 1.0
    ratio = found.dense("weight", torch.float64)[1, 1] / 1e-21
    assert float(ratio) == pytest.approx(float(expected[1, 1]), rel=1e-2)
    masks = pk.prune(net, "grasp", amount=3, data=data, temperature=2e9, apply=False)
    assert masks["weight"].flatten().tolist() == [False, False, False, True]


def test_grasp_ranks_negative_scores_by_their_sign() -> None:
    net, data = layer(), sample()
    masks = pk.prune(net, "grasp", amount=1, data=data, apply=False)
    assert masks["weight"].flatten().tolist() == [False, True, True, True]


def test_grasp_redraws_linear_layers_only_for_scoring() -> None:
    net, data = make("conv"), batches("conv")
    before = net.head.weight.detach().clone()
    plain = pk.score(net, "grasp", data=data)
    drawn = pk.score(net, "grasp", data=data, reinit_linear=True)
    published = pk.score(net, "grasp", data=data, variant="published")
    assert torch.equal(net.head.weight, before)
    assert torch.equal(drawn.dense("head.weight"), published.dense("head.weight"))
    assert not torch.allclose(drawn.dense("head.weight"), plain.dense("head.weight"))
    # The weights that are scored are those drawn, of Xavier's deviation.
    wide = nn.Sequential(nn.Linear(400, 300, bias=False), nn.Tanh(), nn.Linear(300, 3)).double()
    nn.init.constant_(wide[0].weight, 0.0)
    x = torch.randn(4, 400).double()
    found = pk.score(wide, "grasp", data=(x, torch.arange(4) % 3), reinit_linear=True)
    assert float(found.dense("0.weight", torch.float64).abs().max()) > 0


def opposite(method: str, **options: Any) -> pk.Scores:
    """Two batches whose gradients cancel."""
    x = torch.ones(2, 2, dtype=torch.float64)
    data = [(x, torch.ones(2)), (x, -torch.ones(2))]
    return pk.score(
        layer(), method, data=data, loss_fn=lambda y, sign: (y.sum(1) * sign).mean(), **options
    )


@pytest.mark.parametrize("method", ["snip", "itersnip", "force", "grasp_it"])
def test_magnitudes_are_taken_after_the_sum_over_batches(method: str) -> None:
    found = opposite(method)
    assert float(found.dense("weight").abs().max()) == 0
    x = torch.ones(2, 2, dtype=torch.float64)
    with pytest.warns(PaikernWarning, match=f"{method}: scores carry no information"):
        masks = pk.prune(
            layer(), method, sparsity=0.5, rounds=1, loss_fn=lambda y, s: (y.sum(1) * s).mean(),
            data=[(x, torch.ones(2)), (x, -torch.ones(2))],
        )  # fmt: skip
    assert masks["weight"].flatten().tolist() == [True, True, False, False]


def test_force_brings_back_what_itersnip_never_does() -> None:
    net, data = make("mlp"), batches("mlp")
    dense = pk.score(net, "force", data=data)
    masks = oracle.ones(net)
    best = int(dense.dense("0.weight").argmax())
    masks["0.weight"].view(-1)[best] = False  # the best weight pruned by mistake
    given = pk.MaskSet.from_bool(masks)
    again = {
        method: pk.select(pk.score(net, method, data=data, masks=given), sparsity=0.5)
        for method in ("force", "itersnip", "grasp_it", "crop", "grasp")
    }
    kept = {method: bool(found["0.weight"].view(-1)[best]) for method, found in again.items()}
    assert kept == {
        "force": True, "itersnip": False, "grasp_it": False, "crop": False, "grasp": False
    }  # fmt: skip


# --- what published codes keep ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kept"),
    # Scores 3, 2, 2, 2, 1, 1 of which 3 are to be kept and 3 removed.
    [
        ("snip", [True, True, True, True, False, False]),  # all that tie with the third
        ("force", [True, True, True, True, False, False]),
        ("grasp", [True, True, True, True, False, False]),  # from the third smallest up
        ("crop", [True, False, False, False, False, False]),  # above the third
        ("magnitude", [True, False, False, False, False, False]),  # above the third smallest
    ],
)
def test_ties_in_published_rules(method: str, kept: list[bool]) -> None:
    # With one output, a loss of half its square and x of ones, all of g and of H g are equal.
    net = layer([[3.0, 2.0, 2.0, 2.0, 1.0, 1.0]])
    data = torch.ones(1, 6, dtype=torch.float64)
    given: dict[str, Any] = {} if method == "magnitude" else {
        "data": data, "loss_fn": lambda y, _: y.square().sum() / 2, "rounds": 1
    }  # fmt: skip
    few = pytest.warns(PaikernWarning, match="keeps 1 weights where 3 were asked for")
    with few if sum(kept) == 1 else contextlib.nullcontext():  # one more or less is not told
        masks = pk.prune(net, method, sparsity=0.5, selection="published", apply=False, **given)
    assert masks["weight"].flatten().tolist() == kept
    exact = pk.prune(net, method, sparsity=0.5, apply=False, **given)
    assert exact["weight"].flatten().tolist() == [True] * 3 + [False] * 3


def test_published_rules_without_ties_differ_by_the_threshold() -> None:
    scores = pk.Scores({"w": pk.Dense(torch.tensor([4.0, 3.0, 2.0, 1.0]))}, {"w": (4,)})
    from paikern.selection import PUBLISHED, select_packed

    kept = {
        rule: int(pk.ops.unpack_mask(select_packed(scores, 2, rule)["w"], (4,)).sum())
        for rule in PUBLISHED
    }
    assert kept == {
        "above_removed": 2, "at_least_kept": 2, "at_least_removed": 3, "above_kept": 1
    }  # fmt: skip


# --- rounds -------------------------------------------------------------------------------------


def test_halving_schedule() -> None:
    steps = [round(1 - d, 4) for d in schedule_densities(0.02, 7, "halving")]
    assert steps == [0.5, 0.74, 0.86, 0.92, 0.95, 0.965, 0.98]
    assert schedule_densities(0.5, 7, "halving") == [0.5]
    assert schedule_densities(0.8, 7, "halving") == [0.8]  # the published list would start at .5
    assert schedule_densities(0.1, 1, "halving") == [0.1]


def test_cropit_prunes_along_its_list() -> None:
    net, seen = make("mlp"), []
    pk.prune(
        net, "cropit", sparsity=0.98, data=batches("mlp"), apply=False, on_collapse="floor",
        progress=lambda done, total, values: seen.append((done, total, values["density"])),
    )  # fmt: skip
    n = sum(mask.numel() for mask in oracle.ones(net).values())
    sparsities = [0.5, 0.74, 0.86, 0.92, 0.95, 0.965, 0.98]
    assert [s[:2] for s in seen] == [(i, 7) for i in range(1, 8)]
    assert [round(s[2] * n) for s in seen] == [n - int(p * n) for p in sparsities]
    once = pk.prune(net, "cropit", sparsity=0.4, data=batches("mlp"), apply=False)
    assert len(once.metadata["history"]) == 1
    crop = pk.prune(net, "crop", sparsity=0.4, data=batches("mlp"), apply=False)
    assert once == crop
    assert once.metadata["arguments"]["schedule"] == "halving"


@pytest.mark.parametrize(
    ("method", "rounds"), [("snip", 1), ("grasp", 3), ("force", 4), ("itersnip", 4), ("cropit", 5)]
)
@pytest.mark.parametrize("options", [{}, {"scope": "erk"}, {"pattern": "2:4"}], ids=str)
def test_every_round_keeps_what_was_asked_for(
    method: str, rounds: int, options: dict[str, str]
) -> None:
    net = make("conv")
    given: dict[str, Any] = dict(options)
    if "pattern" not in given:
        given["sparsity"] = 0.9
    masks = pk.prune(
        net, method, rounds=rounds, data=batches("conv"), apply=False, on_collapse="floor",
        progress=False, ignore=["stem"], **given,
    )  # fmt: skip
    assert len(masks.metadata["history"]) == rounds or "pattern" in given
    if "pattern" not in given:
        assert masks.kept == masks.total - math.floor(0.9 * masks.total)
    densities = [row["density"] for row in masks.metadata["history"]]
    assert all(a >= b for a, b in itertools.pairwise(densities))


def test_a_layer_that_is_emptied_is_named() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        net[2].weight.mul_(1e-6)
        net[2].bias.normal_()
        net[4].weight.mul_(0.1)
    data = (torch.randn(6, 8), torch.arange(6) % 3)
    with pytest.warns(PaikernWarning, match=r"layer collapse: 0\.weight, 2\.weight keep no weight"):
        pk.prune(net, "force", sparsity=0.9, rounds=1, data=data, apply=False)
    with pytest.raises(pk.SparsityError, match=r"layer collapse: 0\.weight, 2\.weight would keep"):
        pk.prune(net, "force", sparsity=0.9, rounds=1, data=data, on_collapse="raise")
    floored = pk.prune(net, "grasp", sparsity=0.9, data=data, on_collapse="floor", apply=False)
    assert min(floored.kept_by_layer.values()) >= 1


def test_batches_go_on_where_the_last_round_stopped() -> None:
    net = make("mlp")
    data = batches("mlp", 3)
    seen: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(next(i for i, (_, y) in enumerate(data) if y is targets))
        return F.cross_entropy(outputs, targets)

    pk.prune(
        net, "force", sparsity=0.5, rounds=3, data=data, batches=2, loss_fn=loss, progress=False
    )
    assert seen == [0, 1, 2, 0, 1, 2]


# --- Random-U -----------------------------------------------------------------------------------


def test_random_u_keeps_each_weight_by_itself() -> None:
    net = nn.Sequential(nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 50))
    n, rho = 25_000, 0.9
    kept = [
        pk.prune(net, "random_u", sparsity=rho, seed=seed, apply=False).kept for seed in range(8)
    ]
    deviation = math.sqrt(n * rho * (1 - rho))
    assert len(set(kept)) > 1
    assert all(abs(k - n * (1 - rho)) < 4 * deviation for k in kept)
    assert abs(sum(kept) / 8 - n * (1 - rho)) < 4 * deviation / math.sqrt(8)
    a, b = (pk.prune(net, "random_u", sparsity=rho, seed=3, apply=False) for _ in range(2))
    assert a == b
    assert a.metadata["arguments"]["exact"] is False
    assert a.metadata["achieved_sparsity"] == a.sparsity != rho
    history = a.metadata["history"]
    assert [row["kept"] for row in history] == list(a.kept_by_layer.values())
    by_layer = pk.prune(net, "random_u", sparsity=rho, scope="erk", apply=False).kept_by_layer
    assert by_layer["2.weight"] / 5000 > 1.5 * by_layer["0.weight"] / 20000
