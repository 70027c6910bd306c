"""DPaI against its float64 reference, worked example, goldens and rules."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from bench.references.dpai import DPaIReference
from paikern import zoo
from paikern.errors import PaikernError, PaikernWarning, SparsityError
from paikern.preparation import prepare_run
from paikern.scorers import DPaI, DPaITrainer
from python_tests.oracles import goldens
from python_tests.scorers.helpers import agreement, counts

IMAGE = torch.ones(1, 3, 32, 32)


def run(model: nn.Module, x: Tensor, **options: Any) -> pk.MaskSet:
    options = {"apply": False, "progress": False, **options}
    return pk.prune(model, "dpai", example_inputs=x, **options)


def trainer(
    model: nn.Module, x: Tensor, kept: list[int], variant: str = "paper", **options: Any
) -> DPaITrainer:
    settings = DPaI(**options).resolved(variant)
    return DPaITrainer(prepare_run(model, settings, x, (), None, 0, variant), settings, kept)


def unpacked(found: DPaITrainer) -> dict[str, Tensor]:
    shapes = found.run.shapes
    return {n: pk.ops.unpack_mask(m, shapes[n]) for n, m in found.masks.items()}


def tiny_net() -> nn.Module:
    """Small, with a residual branch, a shortcut, a grouped convolution and a max pool."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 8, 3, padding=1)
            self.body = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)
            self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            x = self.pool((self.body(x) + self.shortcut(x)).relu())
            y: Tensor = self.head(x.mean((2, 3)))
            return y

    return Net()


def assert_follows(
    model: nn.Module,
    x: Tensor,
    sparsity: float,
    steps: int,
    *,
    variant: str,
    dtype: torch.dtype = torch.float64,
    at_least: float = 0.999,
    **options: Any,
) -> None:
    """The same start, the same number of steps: masks, and the counts of every step."""
    reference = DPaIReference(model, x, sparsity, variant=variant, dtype=dtype, seed=3, **options)
    start = {name: s.float() for name, s in reference.scores().items()}
    seen: list[dict[str, float]] = []
    found = run(
        model, x, sparsity=sparsity, variant=variant, steps=steps, init_scores=start,
        progress=lambda done, total, values: seen.append(values), **options,
    )  # fmt: skip
    expected = [reference.step() for _ in range(steps)]
    assert agreement(found, reference.masks()) >= at_least
    assert found.kept_by_layer == counts(reference.masks())
    # One flip in a large network may move a count by one; below 5,000 this is equality.
    for values, step in zip(seen, expected, strict=True):
        assert values["effective_nodes"] == step.nodes
        assert values["effective_kernels"] == pytest.approx(step.kernels, rel=1e-4, abs=0)
        assert values["effective_params"] == pytest.approx(step.weights, rel=1e-4, abs=0)
    objectives = [s.objective for s in expected]
    key = "objective" if variant == "published" else "log_paths"
    assert [v[key] for v in seen] == pytest.approx(objectives, abs=1e-5)


def test_published_follows_float64_for_60_steps() -> None:
    assert_follows(zoo.create("resnet20", seed=0), IMAGE, 0.98, 60, variant="published")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.99])
def test_paper_follows_float64(alpha: float) -> None:
    model = zoo.create("resnet20", seed=0)
    assert_follows(model, IMAGE, 0.98, 20, variant="paper", alpha=alpha)


@pytest.mark.parametrize("variant", ["paper", "published"])
@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.7, 0.0), (0.7, 1.0), (1.0, 0.3)])
def test_small_net_follows_float64(variant: str, optimizer: str, alpha: float, beta: float) -> None:
    options = {"optimizer": optimizer, "alpha": alpha, "beta": beta, "lr": 0.01}
    model, x = tiny_net(), torch.ones(1, 2, 8, 8)
    assert_follows(model, x, 0.6, 15, variant=variant, at_least=1.0, **options)


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_chain_follows_float64_exactly(variant: str) -> None:
    model, x = zoo.create("lenet300", seed=0), torch.ones(1, 784)
    assert_follows(model, x, 0.95, 8, variant=variant, at_least=1.0)


@pytest.mark.slow
def test_published_vgg16_follows_float64() -> None:
    """Every objective is that of the mask it was counted on, and the masks are those of float64.

    At step 11 two weights swap whose scores are 7.8e-8 apart, which is how float32 rounds; from
    then on the two runs count paths of masks that differ in a few weights (J by up to 1.9e-4).
    """
    model, steps = zoo.create("vgg16_bn", seed=0), 60
    reference = DPaIReference(model, IMAGE, 0.98, dtype=torch.float64, seed=3)
    kept = list(counts(reference.masks()).values())
    start = {name: s.float() for name, s in reference.scores().items()}
    found = trainer(model, IMAGE, kept, "published", init_scores=start)
    probe = DPaIReference(model, IMAGE, 0.98, dtype=torch.float64, seed=3)
    for _ in range(steps):
        probe.set_scores({n: m.double() for n, m in unpacked(found).items()})
        assert found.step().objective == pytest.approx(probe.gradients()[0], abs=1e-6)
        reference.step()
    assert agreement(unpacked(found), reference.masks()) >= 0.999
    assert counts(unpacked(found)) == counts(reference.masks())


@pytest.mark.slow
def test_published_resnet20_at_90_follows_float64() -> None:
    model = zoo.create("resnet20", seed=0)
    reference = DPaIReference(model, IMAGE, 0.9, dtype=torch.float64, seed=3)
    start = {name: s.float() for name, s in reference.scores().items()}
    found = run(model, IMAGE, sparsity=0.9, variant="published", steps=60, init_scores=start)
    for _ in range(60):
        reference.step()
    assert agreement(found, reference.masks()) >= 0.999


def worked_example(**options: Any) -> DPaITrainer:
    """The example's masks, made by scores of 2 (kept) and 0.25."""
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    start = {
        name: torch.where(torch.tensor(mask) > 0, 2.0, 0.25)
        for name, mask in zip(("0.weight", "2.weight"), goldens.DPAI_MASKS, strict=True)
    }
    return trainer(model, torch.ones(1, 3), [3, 2], init_scores=start, **options)


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_worked_example(variant: str) -> None:
    found = worked_example(variant=variant, alpha=0.99, beta=0.5, lr=0.01, optimizer="ascent")
    before = {n: s.clone() for n, s in found.s.items()}
    step = found.step()
    assert step.objective == pytest.approx(math.log(goldens.DPAI_PATHS), rel=1e-6)
    assert (step.nodes, step.kernels, step.params) == (
        sum(goldens.DPAI_NODES), goldens.DPAI_KERNELS, goldens.DPAI_WEIGHTS,
    )  # fmt: skip
    layers = zip(before, (3, 2), goldens.DPAI_GRADIENTS, goldens.DPAI_UPDATE_WEIGHTS, strict=True)
    for name, k, q, u in layers:  # s moves by lr * k * u * q: all scores are positive
        moved = (found.s[name].double() - before[name].double()) / (0.01 * k)
        expected = torch.tensor(q).double() * torch.tensor(u).double()
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-5)


def test_negative_scores_move_away_from_zero_and_zeros_stay() -> None:
    model = nn.Linear(3, 1)
    start = {"weight": torch.tensor([[-1.0, 0.5, 0.0]])}
    found = trainer(model, torch.ones(1, 3), [2], init_scores=start, alpha=0.0, lr=0.1)
    found.step()  # q = 1/2 everywhere, the step is 0.1 * k * q = 0.1
    torch.testing.assert_close(found.s["weight"], torch.tensor([[-1.1, 0.6, 0.0]]))


@pytest.mark.parametrize(
    ("name", "classes", "expected"),
    [("resnet20", 10, goldens.RESNET20_QUOTAS_90), ("vgg19_bn", 100, goldens.VGG19_QUOTAS_90)],
)
def test_published_quotas(name: str, classes: int, expected: list[int]) -> None:
    with torch.device("meta"):
        model = zoo.create(name, num_classes=classes)
    masks = run(model, IMAGE, sparsity=0.9, variant="published", steps=0)
    assert list(masks.kept_by_layer.values()) == expected


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98, 0.995])
def test_paper_quotas_are_exact(sparsity: float) -> None:
    model = zoo.create("resnet20")
    masks = run(model, IMAGE, sparsity=sparsity, steps=0)
    assert masks.kept == pk.budget.keep_count(270_896, sparsity)


@pytest.mark.parametrize(("sparsity", "expected"), goldens.DPAI_START.items())
def test_start_values(sparsity: tuple[str, float], expected: tuple[Any, ...]) -> None:
    """Published start of another random stream: within the band that the draw leaves."""
    name, fraction = sparsity
    objective, log_paths, nodes, kernels, params = expected
    with torch.device("meta"):
        model = zoo.create(name)
    seen: list[dict[str, float]] = []
    run(
        model, IMAGE, sparsity=fraction, variant="published", steps=1,
        progress=lambda done, total, values: seen.append(values),
    )  # fmt: skip
    assert seen[0]["objective"] == pytest.approx(objective, abs=1.5)
    assert seen[0]["effective_nodes"] == pytest.approx(nodes, abs=5)
    assert seen[0]["effective_kernels"] == pytest.approx(kernels, rel=0.01)
    if params is not None:
        assert seen[0]["effective_params"] == pytest.approx(params, rel=0.001)
    start = run(model, IMAGE, sparsity=fraction, variant="published", steps=0)
    top = pk.analyze(model, start, example_inputs=IMAGE)
    assert top.log_paths == pytest.approx(log_paths, abs=1.5)
    assert top.effective_nodes == seen[0]["effective_nodes"]
    assert top.effective_params == seen[0]["effective_params"]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_default_ascent_raises_its_objective(alpha: float) -> None:
    """From a random ERK start near 42; Adam with alpha 0 does not move it."""
    model = zoo.create("resnet20")
    masks = run(model, IMAGE, sparsity=0.98, steps=100, alpha=alpha)
    assert masks.metadata["history"][0]["log_paths"] == pytest.approx(42, abs=1.5)
    assert pk.analyze(model, masks, example_inputs=IMAGE).log_paths > 65
    adam = run(model, IMAGE, sparsity=0.98, steps=30, alpha=0.0, optimizer="adam", seed=1)
    assert pk.analyze(model, adam, example_inputs=IMAGE).log_paths < 45


def test_paper_and_published_agree_on_chains_only() -> None:
    """Dividing by the maximum cancels in a chain; at a residual add it does not."""
    options = {"sparsity": 0.8, "steps": 5, "optimizer": "adam", "lr": 0.05, "scope": "local"}
    chain, x = zoo.create("mlp", sizes=(30, 40, 20, 10)), torch.ones(1, 30)
    paper, published = (run(chain, x, variant=v, **options) for v in ("paper", "published"))
    assert paper == published
    residual, image = zoo.create("resnet20"), IMAGE
    paper, published = (run(residual, image, variant=v, **options) for v in ("paper", "published"))
    assert paper != published


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_every_step_keeps_exactly_the_budget(variant: str) -> None:
    model, x = tiny_net(), torch.ones(1, 2, 8, 8)
    kept = [37, 101, 20, 11]
    found = trainer(model, x, kept, variant)
    for _ in range(10):
        found.step()
        found.select()
        assert [pk.MaskSet(found.masks, found.run.shapes).kept_by_layer[n] for n in found.s] == kept


def test_ties_keep_the_lower_index() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    start = {"0.weight": torch.ones(3, 4), "1.weight": -torch.ones(2, 3)}
    found = trainer(model, torch.ones(1, 4), [5, 4], init_scores=start)
    bits = pk.MaskSet(found.masks, found.run.shapes)
    assert bits["0.weight"].flatten().tolist() == [True] * 5 + [False] * 7
    assert bits["1.weight"].flatten().tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_seeds(variant: str) -> None:
    model, x = tiny_net(), torch.ones(1, 2, 8, 8)
    options: dict[str, Any] = {"sparsity": 0.7, "steps": 5, "variant": variant}
    first = run(model, x, seed=1, **options)
    torch.manual_seed(99)  # the global generator plays no part
    assert run(model, x, seed=1, **options) == first
    assert run(model, x, seed=2, **options) != first


def test_no_steps_is_random_erk() -> None:
    model = zoo.create("resnet20")
    random = pk.prune(model, "random", sparsity=0.9, scope="erk", apply=False, seed=4)
    found = run(model, IMAGE, sparsity=0.9, steps=0, seed=4)
    assert found.kept_by_layer == random.kept_by_layer
    scores = pk.score(model, "random", seed=4)
    for name in scores:  # DPaI ranks by |s|
        order = scores.dense(name).abs().flatten().argsort(descending=True, stable=True)
        kept = found[name].flatten()
        assert kept[order[: found.kept_by_layer[name]]].all()


def test_weights_are_not_read() -> None:
    model, x = tiny_net(), torch.ones(1, 2, 8, 8)
    expected = run(model, x, sparsity=0.7, steps=5)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    assert run(model, x, sparsity=0.7, steps=5) == expected
    with torch.device("meta"):
        shapes_only = tiny_net()
    assert run(shapes_only, x, sparsity=0.7, steps=5) == expected
    with pytest.raises(ValueError, match="is on the meta device and holds no values"):
        run(shapes_only, x, sparsity=0.7, steps=5, apply=True)


def test_scores_of_a_run_select_its_masks() -> None:
    model, x = tiny_net(), torch.ones(1, 2, 8, 8)
    masks = run(model, x, sparsity=0.7, steps=5)
    scores = pk.score(model, "dpai", sparsity=0.7, steps=5, example_inputs=x)
    again = run(model, x, sparsity=0.7, steps=0, init_scores={n: scores.dense(n) for n in scores})
    assert again == masks


def test_init_scores_are_copied() -> None:
    model, x = tiny_net(), torch.ones(1, 2, 8, 8)
    start = {n: torch.randn(s) for n, s in run(model, x, sparsity=0.0).shapes.items()}
    before = {n: s.clone() for n, s in start.items()}
    run(model, x, sparsity=0.7, steps=3, init_scores=start)
    assert all(torch.equal(before[n], start[n]) for n in start)


def test_patience_stops_a_run_that_stands_still() -> None:
    model, x = zoo.create("mlp", sizes=(8, 6, 4)), torch.ones(1, 8)
    seen: list[int] = []
    with pytest.warns(PaikernWarning, match=r"stopped after 4 steps, .* not changed for 4"):
        run(
            model, x, sparsity=0.5, steps=50, lr=1e-9, patience=4,
            progress=lambda done, total, values: seen.append(done),
        )  # fmt: skip
    assert seen == [1, 2, 3, 4]


def test_dead_network() -> None:
    model, x = zoo.create("mlp", sizes=(6, 6, 6, 6)), torch.ones(1, 6)
    start = {f"layers.{i}.weight": torch.zeros(6, 6) for i in (1, 3, 5)}
    start["layers.1.weight"][0, 0] = start["layers.3.weight"][1, 1] = 1.0
    with pytest.raises(PaikernError, match=r"dead network at step 1: .*none gets past layers\.3"):
        run(model, x, sparsity=0.97, steps=3, init_scores=start)


def test_scores_that_overflow_name_step_and_layer() -> None:
    model, x = zoo.create("mlp", sizes=(4, 3)), torch.ones(1, 4)
    with pytest.raises(PaikernError, match=r"layers\.1\.weight are NaN or infinite after step 1"):
        run(model, x, sparsity=0.5, steps=3, lr=1e39)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ({"alpha": math.nan}, r"alpha must be in \[0, 1\], got nan"),
        ({"lr": 0.0}, r"lr must be > 0, got 0.0"),
        ({"lr": math.nan}, r"lr must be > 0, got nan"),
        ({"steps": -1}, r"steps must be >= 0, got -1"),
        ({"patience": 0}, r"patience must be >= 1, got 0"),
        ({"optimizer": "sgd"}, r"optimizer must be 'ascent' or 'adam', got 'sgd'"),
        ({"scope": "global"}, r"scope: dpai keeps a number .* use scope='erk'"),
        ({"variant": "code"}, r"variant must be one of \('paper', 'published'\), got 'code'"),
        ({"init_scores": {"no.weight": torch.ones(1)}}, r"init_scores: 'no.weight' is no prunable"),
        ({"init_scores": {}}, r"init_scores: scores for 'layers.1.weight' are missing"),
        (
            {"init_scores": {"layers.1.weight": torch.ones(4, 3)}},
            r"init_scores\['layers.1.weight'\] must have shape \(3, 4\), got \(4, 3\)",
        ),
        (
            {"init_scores": {"layers.1.weight": torch.full((3, 4), math.nan)}},
            r"init_scores\['layers.1.weight'\] holds NaN",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model = zoo.create("mlp", sizes=(4, 3))
    with pytest.raises(ValueError, match=message):
        run(model, torch.ones(1, 4), sparsity=0.5, **{"steps": 2, **options})


def test_score_needs_a_sparsity() -> None:
    with pytest.raises(SparsityError, match="sparsity: dpai trains its scores under a budget"):
        pk.score(zoo.create("mlp", sizes=(4, 3)), "dpai", example_inputs=torch.ones(1, 4))


class Shared(nn.Module):
    """A weight used twice, attention with a fused projection, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(6, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        x = self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = self.up(x.transpose(1, 2))
        return y


def test_shared_fused_and_transposed_weights_train() -> None:
    model, x = Shared(), torch.ones(1, 5, 6)
    masks = run(model, x, sparsity=0.5, steps=30, alpha=0.0)
    assert list(masks) == [
        "first.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "up.weight",
    ]
    history = masks.metadata["history"]
    assert history[-1]["log_paths"] > history[0]["log_paths"] + 0.5
    top = pk.analyze(model, run(model, x, sparsity=0.5, steps=0), example_inputs=x)
    assert history[0]["log_paths"] == pytest.approx(top.log_paths, abs=1e-5)
    assert history[0]["effective_nodes"] == top.effective_nodes
    assert history[0]["effective_params"] == top.effective_params


_RUN = """
import torch, paikern as pk
model = pk.zoo.create("resnet20", seed=0)
x = torch.ones(1, 3, 32, 32)
for variant in ("paper", "published"):
    masks = pk.prune(model, "dpai", variant=variant, sparsity=0.9, steps=4, example_inputs=x,
                     apply=False, progress=False)
    print(masks.digest)
print(pk.prune(model, "synflow", sparsity=0.9, rounds=5, example_inputs=x, apply=False,
               progress=False).digest)
"""


def test_masks_do_not_depend_on_the_number_of_threads() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", _RUN],
            env={**os.environ, "OMP_NUM_THREADS": threads},
            check=True, capture_output=True, text=True,
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
    assert len(found.pop().split()) == 3
