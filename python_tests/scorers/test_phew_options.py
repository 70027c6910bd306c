"""Options of PHEW and of every builder of masks: what is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paikern as pk

X = torch.ones(1, 8)


def phew(**options: Any) -> pk.MaskSet:
    net = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0)
    given = {"sparsity": 0.5, "example_inputs": X, "apply": False, "progress": False} | options
    return pk.prune(net, given.pop("method", "phew"), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stall": 1.5}, "stall must be an integer of 0 or more, got 1.5"),
        ({"stall": -1}, "stall must be an integer of 0 or more, got -1"),
        ({"stall": 2**70}, "stall must be an integer"),
        ({"stall": None}, "stall must be an integer of 0 or more, got None"),
        ({"stall": True}, "stall must be an integer"),
        ({"exact": "no"}, "exact must be True or False, got 'no'"),
        ({"identity_skips": 3}, "identity_skips must be True or False, got 3"),
        ({"kernel_conserved": "x"}, "kernel_conserved must be True or False, got 'x'"),
        ({"weighting": "cube"}, "weighting must be one of abs, square, inverse, got 'cube'"),
        ({"grow_from": 3}, "grow_from must be a MaskSet, or a dict .* got int"),
        ({"grow_from": "masks.safetensors"}, "grow_from must be a MaskSet.* got str"),
        ({"grow_from": {"layers.1.weight": 3}}, "grow_from must be a MaskSet"),
        ({"grow_from": {"layers.1.weight": torch.full((16, 8), 0.5)}}, "bool tensors"),
        ({"variant": "published", "identity_skips": True}, "use variant='paper'"),
        ({"pattern": "2:4", "sparsity": None}, "pattern='2:4': phew builds its mask of single"),
        ({"pattern": "2:4"}, "pattern='2:4': phew builds its mask of single weights"),
        ({"method": "npb", "pattern": "2:4"}, "pattern='2:4': npb builds its mask of single"),
        ({"method": "dpai", "pattern": "2:4"}, "pattern='2:4': dpai trains its scores for single"),
        ({"rounds": 2}, "rounds=2: phew builds its mask without scores; use rounds=1"),
        ({"scope": "lamp"}, "scope='lamp': phew builds its mask without scores"),
        ({"on_collapse": "floor"}, "on_collapse='floor': phew builds its mask without scores"),
        ({"selection": "published"}, "selection='published': phew builds its mask without"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        phew(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["phew", "npb", "dpai", "random", "magnitude"])
@pytest.mark.parametrize("seed", [1.5, "a", None, True, 2**63, -(2**63) - 1])
def test_seeds_are_integers_of_64_bits(method: str, seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be an integer from -2\*\*63") as caught:
        phew(method=method, seed=seed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["phew", "npb", "random"])
def test_every_seed_in_range_works(method: str) -> None:
    found = [phew(method=method, seed=s) for s in (-(2**63), -1, 0, 2**63 - 1)]
    assert {masks.kept for masks in found} == {96}
    assert found[1] != found[2]


def test_a_builder_has_no_scores() -> None:
    net = pk.zoo.create("mlp", sizes=(8, 16, 4), seed=0)
    with pytest.raises(ValueError, match="phew builds masks and has no scores"):
        pk.score(net, "phew", example_inputs=X)
