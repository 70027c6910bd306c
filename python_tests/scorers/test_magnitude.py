"""Magnitude: the largest |w|, exactly as many as asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import paikern as pk
from bench.references.magnitude import magnitude
from paikern import zoo


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9, 0.98])
@pytest.mark.parametrize("name", ["lenet300", "resnet20"])
def test_against_a_full_sort(name: str, sparsity: float, scope: str) -> None:
    model = zoo.create(name, seed=1)
    found = pk.prune(model, "magnitude", sparsity=sparsity, scope=scope, apply=False)
    expected = magnitude(model, sparsity, scope=scope)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_ties_keep_the_lower_index() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -1.0], [0.5, 2.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, -2.0], [-0.5, 0.5]]))
    masks = pk.prune(model, "magnitude", sparsity=0.625, apply=False)
    assert masks["0.weight"].tolist() == [[False, True], [False, True]]
    assert masks["1.weight"].tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = zoo.create("mlp", sizes=(50, 40, 10), seed=2).to(dtype)
    found = pk.prune(model, "magnitude", sparsity=0.9, apply=False)
    flat = torch.cat([p.detach().abs().flatten() for p in model.parameters() if p.dim() == 2])
    order = flat.double().argsort(descending=True, stable=True)
    expected = torch.zeros(2400, dtype=torch.bool)
    expected[order[:240]] = True
    assert torch.equal(torch.cat([found[n].flatten() for n in found]), expected)


def test_weights_stored_in_another_order() -> None:
    """A channels-last or transposed weight is ranked by its logical, row-major index."""
    model = nn.Conv2d(8, 8, 3)
    expected = pk.prune(model, "magnitude", sparsity=0.7, apply=False)
    last = model.to(memory_format=torch.channels_last)
    assert not last.weight.is_contiguous()
    assert pk.prune(last, "magnitude", sparsity=0.7) == expected
    assert int((last.weight != 0).sum()) == expected.kept


def test_scores_share_the_weights() -> None:
    model = zoo.create("mlp", sizes=(4, 3))
    entry = pk.score(model, "magnitude")["layers.1.weight"]
    assert isinstance(entry, pk.Dense)
    assert entry.values.data_ptr() == model.layers[1].weight.data_ptr()
    assert entry.absolute
