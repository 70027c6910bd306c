"""Wanda against inputs caught by hooks, by hand, and in models that call weights in odd ways."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk
from paikern.errors import PaikernWarning
from python_tests.oracles.wanda import row_masks, wanda_scores
from python_tests.scorers.data_nets import (
    NETWORKS,
    assert_same_state,
    double,
    network,
    state_of,
)
from python_tests.scorers.helpers import agreement


def test_by_hand() -> None:
    """Norms 3-4-5: the small weight of the loud input wins."""
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -4.0], [2.0, 0.5]]))
    x = torch.tensor([[3.0, 1.0], [4.0, 0.0]])  # norms 5 and 1
    scores = pk.score(model, "wanda", data=x)
    assert torch.equal(scores.dense("weight"), torch.tensor([[5.0, 4.0], [10.0, 0.5]]))
    masks = pk.prune(model, "wanda", sparsity=0.5, data=x)
    assert masks["weight"].tolist() == [[True, False], [True, False]]
    assert model.weight.tolist() == [[1.0, 0.0], [2.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_against_hooks(name: str, dtype: torch.dtype) -> None:
    model, data = network(name)
    expected = wanda_scores(model, data)
    if dtype == torch.float64:
        model, data = model.double(), double(data)
    before = state_of(model)
    scores = pk.score(model, "wanda", data=data)
    assert_same_state(model, before)
    assert list(scores) == list(expected)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for layer, values in expected.items():
        found = scores.dense(layer, torch.float64)
        torch.testing.assert_close(found, values, rtol=rtol, atol=rtol * float(values.max()))
    for sparsity in (0.3, 0.5, 0.71):
        masks = pk.prune(model, "wanda", sparsity=sparsity, data=data, apply=False)
        assert agreement(dict(masks), row_masks(model, expected, sparsity)) >= 0.999


@pytest.mark.parametrize("name", NETWORKS)
def test_later_rounds_see_the_pruned_network(name: str) -> None:
    model, data = network(name)
    masks = {}
    for sparsity in (0.3, 0.5, 0.7):
        scores = wanda_scores(model, data, masks or None)
        for layer, mask in masks.items():
            scores[layer] = torch.where(mask, scores[layer], -1.0)
        masks = row_masks(model, scores, sparsity)
    found = None
    for sparsity in (0.3, 0.5, 0.7):
        scored = pk.score(model, "wanda", data=data, masks=found)
        found = pk.select(scored, sparsity=sparsity, scope="row")
    assert agreement(dict(found), masks) >= 0.999


def test_batches_add_up() -> None:
    model, (x, y) = network("residual")
    whole = pk.score(model, "wanda", data=x)
    for data in ((x, y), [x[:3], x[3:]], [(x[:11], y[:11]), (x[11:], y[11:])]):
        uneven = pytest.warns(PaikernWarning, match="batches of")
        with uneven if len(data[0]) < 20 else nullcontext():
            parts = pk.prune(model, "wanda", sparsity=0.5, data=data, apply=False)
        assert agreement(dict(parts), dict(pk.select(whole, sparsity=0.5, scope="row"))) > 0.999
    one = pk.score(model, "wanda", data=x, batches=1, batch_size=5)
    first = pk.score(model, "wanda", data=x[:5])
    assert all(torch.equal(one.dense(n), first.dense(n)) for n in one)


class CrossAttention(nn.Module):
    """Projections that `nn.MultiheadAttention` calls by function, with three different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, 2 * x.flip(1), x**2, need_weights=False)[0]


def test_attention_projections() -> None:
    model, x = CrossAttention(), torch.randn(3, 5, 8)
    scores = pk.score(model, "wanda", data=x)
    attention = model.attention
    inputs = (x, 2 * x.flip(1), x**2)
    norms = torch.stack([v.flatten(0, 1).norm(dim=0) for v in inputs])  # [3, in]
    expected = attention.in_proj_weight.view(3, 8, 8).abs() * norms[:, None]
    found = scores.dense("attention.in_proj_weight")
    torch.testing.assert_close(found, expected.reshape(24, 8).detach())
    q, k, v = (
        F.linear(a, w, b).view(3, 5, 2, 4).transpose(1, 2)
        for a, w, b in zip(
            inputs, attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    mixed = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    norm = mixed.transpose(1, 2).reshape(-1, 8).norm(dim=0)
    expected = (attention.out_proj.weight.abs() * norm).detach()
    torch.testing.assert_close(scores.dense("attention.out_proj.weight"), expected)


def test_whole_encoder_layers_are_seen() -> None:
    """In eval mode PyTorch runs such a layer as one operation."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    assert torch.backends.mha.get_fastpath_enabled()
    masks = pk.prune(model, "wanda", sparsity=0.5, data=torch.randn(3, 5, 8), apply=False)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(bool((m.sum(1) == m.shape[1] // 2).all()) for m in masks.values())


class Twice(nn.Module):
    """One weight for two products, once transposed, and one through einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        self.outer = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x) + x @ self.inner.weight
        return torch.einsum("bti,oi->bto", h, self.outer.weight)


def test_shared_and_transposed_uses_add_up() -> None:
    model, x = Twice(), torch.randn(2, 5, 4)
    scores = pk.score(model, "wanda", data=x)
    squares = x.flatten(0, 1).square().sum(0)
    expected = model.inner.weight.abs() * (squares + squares[:, None]).sqrt()
    torch.testing.assert_close(scores.dense("inner.weight"), expected.detach())
    h = model.inner(x) + x @ model.inner.weight
    expected = model.outer.weight.abs() * h.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(scores.dense("outer.weight"), expected.detach())


def test_weights_in_one_storage() -> None:
    """As after flattening parameters into one buffer."""
    model, (x, _) = network("mlp")
    expected = pk.score(model, "wanda", data=x)
    layers = [model[0], model[2], model[4]]
    flat = torch.cat([layer.weight.detach().flatten() for layer in layers])
    start = 0
    for layer in layers:
        size = layer.weight.numel()
        layer.weight.data = flat[start : start + size].view(layer.weight.shape)
        start += size
    found = pk.score(model, "wanda", data=x)
    assert all(torch.equal(found.dense(n), expected.dense(n)) for n in expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(groups: int) -> None:
    """With one input at a time: its value, as often as its product is not cropped."""
    model = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(2, 4, 5)
    scores = pk.score(model, "wanda", data=x)
    energy = torch.zeros(4, 3)
    length = (5 - 1) * 2 - 2 + 3
    for position in range(5):
        for tap in range(3):
            if 0 <= position * 2 - 1 + tap < length:
                energy[:, tap] += x[:, :, position].square().sum(0)
    expected = model.weight.abs() * energy.sqrt()[:, None]
    torch.testing.assert_close(scores.dense("weight"), expected.detach())
    masks = pk.select(scores, sparsity=0.5, scope="row")
    rows = masks["weight"].view(groups, 4 // groups, 6 // groups, 3)
    kept = rows.sum((1, 3))  # of each output
    length = 4 // groups * 3
    assert kept.unique().tolist() == [length - length // 2]


def test_a_weight_without_product_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.warns(PaikernWarning, match=r"uses idle.weight; their scores are 0"):
        pk.prune(Unused(), "wanda", sparsity=0.5, data=torch.ones(1, 3), apply=False)


def test_other_scopes_and_patterns() -> None:
    model, data = network("mlp")
    scores = wanda_scores(model, data)
    total = sum(s.numel() for s in scores.values())
    masks = pk.prune(model, "wanda", sparsity=0.6, scope="global", data=data, apply=False)
    assert masks.kept == total - int(0.6 * total)
    top = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    assert all(torch.equal(masks[n], s >= top[masks.kept - 1]) for n, s in scores.items())
    half = pk.prune(model, "wanda", pattern="1:2", data=data, apply=False)
    assert half["2.weight"].view(-1, 9)[:, :8].reshape(-1, 2).sum(1).unique().tolist() == [1]


def test_half_precision() -> None:
    model, (x, _) = network("mlp")
    model = model.bfloat16()
    found = pk.score(model, "wanda", data=x.bfloat16())
    expected = wanda_scores(model, (x.bfloat16(),))
    first = "0.weight"  # deeper inputs are rounded to bfloat16 themselves
    torch.testing.assert_close(
        found.dense(first, torch.float64), expected[first], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data: method 'wanda' reads samples"),
        ({"data": torch.ones(2, 6), "selection": "published"}, "no meaning with scope='row'"),
        ({"data": torch.ones(2, 6), "pattern": "block:2x2"}, "use scope='local'"),
        ({"data": torch.full((2, 6), float("nan"))}, "NaN or infinite"),
        ({"data": torch.ones(2, 6), "batches": 2}, "there are only 1"),
    ],
)
def test_bad_use(options: dict[str, Any], message: str) -> None:
    model, _ = network("mlp")
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        pk.prune(model, "wanda", sparsity=0.5, **options)
    assert_same_state(model, before)


def test_an_error_of_the_model_changes_nothing() -> None:
    model, _ = network("residual")
    model.train()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"stem \(Conv2d\)"):
        pk.prune(model, "wanda", sparsity=0.5, data=torch.ones(2, 5, 9, 9))
    assert_same_state(model, before)
    assert torch.backends.mha.get_fastpath_enabled()
