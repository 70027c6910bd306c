"""Random masks: exact counts, the same for the same seed, uniform over the weights."""

from __future__ import annotations

import math

import pytest
import torch

import paikern as pk
from bench.references.magnitude import random
from paikern import zoo


def test_against_the_reference_stream() -> None:
    model = zoo.create("resnet20")
    found = pk.prune(model, "random", sparsity=0.9, seed=5, apply=False)
    expected = random(model, 0.9, seed=5)
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def test_seed_and_global_generator() -> None:
    model = zoo.create("mlp", sizes=(30, 20))
    first = pk.prune(model, "random", sparsity=0.5, apply=False)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    assert pk.prune(model, "random", sparsity=0.5, apply=False, seed=0) == first
    assert pk.prune(model, "random", sparsity=0.5, apply=False, seed=1) != first
    torch.set_rng_state(state)
    assert pk.prune(model, "random", sparsity=0.5, apply=False) == first
    assert torch.equal(state, torch.get_rng_state())


def test_every_weight_has_the_same_chance() -> None:
    """Kept counts of two halves of the weights stay within four standard deviations."""
    model = zoo.create("mlp", sizes=(200, 100, 50))
    total, kept = 25_000, 5_000
    masks = pk.prune(model, "random", sparsity=0.8, apply=False)
    flat = torch.cat([m.flatten() for m in masks.values()])
    assert int(flat.sum()) == kept
    deviation = math.sqrt(kept * 0.8 * 0.25)
    assert abs(int(flat[: total // 2].sum()) - kept / 2) < 4 * deviation
    assert abs(int(flat[::2].sum()) - kept / 2) < 4 * deviation


@pytest.mark.parametrize("sparsity", [0.9, 0.98])
def test_random_erk_counts(sparsity: float) -> None:
    with torch.device("meta"):
        model = zoo.create("vgg19_bn")
    masks = pk.prune(model, "random", sparsity=sparsity, scope="erk", apply=False)
    expected = pk.budget.layer_budget(masks.shapes, sparsity, "erk")
    assert list(masks.kept_by_layer.values()) == expected
    assert masks.kept == pk.budget.keep_count(20_070_080, sparsity)


def test_weights_are_not_read() -> None:
    model = zoo.create("mlp", sizes=(4, 3))
    with torch.no_grad():
        model.layers[1].weight.fill_(math.nan)
    masks = pk.prune(model, "random", sparsity=0.5)
    assert int(torch.isnan(model.layers[1].weight).sum()) == masks.kept == 6
