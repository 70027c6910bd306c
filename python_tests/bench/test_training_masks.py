"""The benchmark of masks during training: its reference, and what its page says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paikern as pk
from bench import run_training_masks as bench
from bench.references import asni as reference


@pytest.mark.parametrize("removed", [0, 1, 300, 600])
def test_the_reference_prunes_what_paikern_prunes(removed: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 20), torch.nn.Linear(20, 3))
    masks = pk.prune(model, "magnitude", amount=removed, apply=False)
    weights = [model[0].weight, model[1].weight]
    before = [weight.detach().clone() for weight in weights]
    found = reference.epoch_end(weights, removed)
    for name, mask, weight, was in zip(masks, found, weights, before, strict=True):
        assert torch.equal(mask.bool(), masks[name])
        assert torch.equal(weight.detach(), torch.where(masks[name], was, 0))
    flat = reference.magnitudes(before)
    assert float(reference.threshold(flat, removed)) == float(flat.sort().values[removed])


def row(what: str, ratio: float) -> dict[str, Any]:
    times = {"seconds": 0.01, "reference_seconds": 0.01 * ratio, "ratio": ratio}
    return {"what": what, "epoch": 45, "sparsity": 0.4052, "threads": 1, **times}


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [((31.0, 45.0), "worst 31.0x: met"), ((29.4, 45.0), "worst 29.4x: **missed**")],
)
def test_the_page_says_what_was_missed(ratios: tuple[float, float], verdict: str) -> None:
    page = bench.report([row("masks", ratio) for ratio in ratios])
    assert f"Asked for: 30x at every epoch; {verdict}." in page
    assert "| 45 | 40.52% | 1 | 10.0 ms |" in page
    assert "The whole end of an epoch" not in page


def test_the_smallest_kept_is_the_threshold() -> None:
    weights = {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([[-2.0, 0.5]])}
    packed = pk.MaskSet.from_bool({n: w.abs() > 1.5 for n, w in weights.items()})
    assert bench.smallest({n: packed.packed(n) for n in packed}, weights) == 2.0
