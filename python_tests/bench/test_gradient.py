"""The plain loops of SNIP and GraSP keep the weights that paikern keeps."""

from __future__ import annotations

import pytest
import torch

import paikern as pk
from bench.references import gradient as plain
from python_tests.gradients.nets import batches, make
from python_tests.scorers.helpers import agreement


@pytest.mark.parametrize("selection", ["exact", "published"])
@pytest.mark.parametrize("method", ["snip", "grasp"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_plain_loops(name: str, method: str, selection: str) -> None:
    model, data = make(name), batches(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = getattr(plain, method)(model, data, 0.7, selection=selection)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    masks = pk.prune(model, method, sparsity=0.7, data=data, apply=False, on_collapse="floor")
    assert agreement(masks, expected) >= 0.99
    if selection == "exact":
        assert masks.kept == sum(int(mask.sum()) for mask in expected.values())
