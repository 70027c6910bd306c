"""SNIP, IterSNIP, FORCE, GraSP, GraSP-It, CroP-U, CroPit-U: scores and masks against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from python_tests.gradients.nets import batches, double, make
from python_tests.oracles import gradients as oracle
from python_tests.scorers.helpers import kept_agreement
from python_tests.small_runs import Untouched

# Query and key weights of a small BERT matter so little that they may go altogether.
pytestmark = pytest.mark.filterwarnings("ignore:layer collapse")

NETS = ["mlp", "conv", "bert", "gpt2"]
#: method -> (the oracle, options, whether pruned weights may return)
METHODS: dict[str, tuple[oracle.Scorer, dict[str, Any], bool]] = {
    "snip": (oracle.snip, {}, True),
    "itersnip": (oracle.itersnip, {}, False),
    "force": (oracle.force, {}, True),
    "grasp_it": (oracle.grasp_it, {}, False),
    "grasp": (oracle.grasp, {}, False),
    "crop": (oracle.crop, {}, False),
}


def some_masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = {name: mask.shape for name, mask in oracle.ones(model).items()}
    return {name: torch.rand(shape, generator=generator) < 0.6 for name, shape in shapes.items()}


def assert_scores(found: pk.Scores, expected: dict[str, Tensor], masks: Any, rtol: float) -> None:
    """Every score within `rtol` of the oracle's; of those near 0, of the layer's largest."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        mine = found.dense(name, torch.float64)
        kept = torch.ones_like(value, dtype=torch.bool) if masks is None else masks[name]
        size = float(value[kept].abs().max())
        assert size > 0
        torch.testing.assert_close(mine[kept], value[kept], rtol=rtol, atol=rtol * size)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_scores_in_float64_equal_the_oracle(method: str, name: str) -> None:
    model, data = make(name), batches(name)
    score, options, _ = METHODS[method]
    if method in ("itersnip", "force", "grasp_it"):  # means over the batches
        expected = mean(score(model, data, oracle.ones(model)), method, len(data))
    else:
        expected = score(model, data, oracle.ones(model))
    found = pk.score(model.double(), method, data=[double(b) for b in data], **options)
    assert_scores(found, expected, None, 1e-5)


def mean(scores: dict[str, Tensor], method: str, count: int) -> dict[str, Tensor]:
    share = count**2 if method == "grasp_it" else count
    return {name: value / share for name, value in scores.items()}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "snip"])
def test_scores_under_masks_equal_the_oracle(method: str, name: str) -> None:
    model, data = make(name), batches(name)
    masks = some_masks(model)
    score, options, returns = METHODS[method]
    expected = score(model, data, masks)
    if method in ("itersnip", "force", "grasp_it"):
        expected = mean(expected, method, len(data))
    found = pk.score(
        model.double(),
        method,
        data=[double(b) for b in data],
        masks=pk.MaskSet.from_bool(masks),
        **options,
    )
    assert_scores(found, expected, None if returns else masks, 1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", METHODS)
def test_float32_scores_and_one_shot_masks(method: str, name: str) -> None:
    model, data = make(name), batches(name)
    score, options, _ = METHODS[method]
    expected = score(model, data, oracle.ones(model))
    found = pk.score(model, method, data=data, **options)
    scaled = (
        mean(expected, method, len(data))
        if method in ("itersnip", "force", "grasp_it")
        else expected
    )
    assert_scores(found, scaled, None, 1e-5)
    masks = pk.prune(model, method, sparsity=0.8, data=data, rounds=1, apply=False, **options)
    total = sum(value.numel() for value in expected.values())
    wanted = oracle.select(expected, total - int(0.8 * total))
    assert masks.kept == total - int(0.8 * total)
    assert kept_agreement(masks, wanted) >= 0.999


@pytest.mark.parametrize("name", ["mlp", "conv", "bert"])
@pytest.mark.parametrize("method", ["itersnip", "force", "grasp_it", "crop"])
def test_ten_rounds_agree_with_the_oracle(method: str, name: str) -> None:
    model, data = make(name), batches(name)
    score, options, returns = METHODS[method]
    wanted = oracle.rounds(model, data, score, 0.8, 10, may_return=returns)
    model = model.double()
    masks = pk.prune(
        model, method, sparsity=0.8, rounds=10, apply=False, progress=False,
        data=[double(b) for b in data], **options, schedule="exponential",
    )  # fmt: skip
    assert masks.kept == sum(int(m.sum()) for m in wanted[-1].values())
    assert kept_agreement(masks, wanted[-1]) >= 0.999
    kept = [round(row["density"] * masks.total) for row in masks.metadata["history"]]
    assert kept == [sum(int(m.sum()) for m in made.values()) for made in wanted]


@pytest.mark.parametrize("name", ["conv", "gpt2"])
@pytest.mark.parametrize("method", [*METHODS, "cropit"])
def test_the_model_is_untouched(method: str, name: str) -> None:
    model = make(name)
    guard = Untouched(model)
    data = batches(name)
    guard.before = guard.look()
    pk.prune(model, method, sparsity=0.5, rounds=2, data=data, apply=False, progress=False)
    guard.check()
    with pytest.raises(ValueError, match=r"loss_fn: the loss of batch 1 is nan"):
        pk.prune(model, method, sparsity=0.5, data=data, progress=False, loss_fn=second_is_nan())
    guard.check()


def second_is_nan() -> Callable[[Any, Any], Tensor]:
    calls = []

    def loss(outputs: Any, targets: Any) -> Tensor:
        calls.append(1)
        logits = outputs if isinstance(outputs, Tensor) else outputs.logits
        return logits.square().mean() * (float("nan") if len(calls) == 2 else 1.0)

    return loss


def test_dropout_is_drawn_from_the_seed() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    data = (torch.randn(9, 6), torch.arange(9) % 3)
    found = []
    for seed in (1, 1, 2):
        torch.rand(3)
        found.append(pk.score(model, "snip", data=data, seed=seed).dense("0.weight"))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_labels_choose_the_scores() -> None:
    model, (x, y) = make("mlp"), batches("mlp", 1)[0]
    found = {
        loss: pk.score(model, "snip", data=(x, y), loss_fn=loss).dense("0.weight")
        for loss in ("cross_entropy", "nll_logits")
    }
    work = oracle.mask_gradient(model, [(x, y)], oracle.ones(model), loss="nll_logits")
    torch.testing.assert_close(
        found["nll_logits"].double(), work["0.weight"].abs(), rtol=1e-4, atol=1e-8
    )
    assert not torch.allclose(found["cross_entropy"], found["nll_logits"], rtol=1e-2)
    published = pk.score(model, "force", data=(x, y), variant="published").dense("0.weight")
    torch.testing.assert_close(published, found["nll_logits"])
