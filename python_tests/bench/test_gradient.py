"""The plain loops of SNIP and GraSP keep the weights that paikern keeps; the page of both."""

from __future__ import annotations

import json

import pytest
import torch

import paikern as pk
from bench import run_gradient as bench
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


@pytest.mark.parametrize(
    ("over_passes", "peak_ratio", "missed"), [(1.1, 0.8, 0), (1.104, 0.8, 1), (1.2, 0.81, 2)]
)
def test_the_page_says_what_was_missed(over_passes: float, peak_ratio: float, missed: int) -> None:
    row = {
        "method": "grasp", "size": "100x3x32x32", "seconds": 3.456, "passes_seconds": 3.1,
        "reference_seconds": 6.0, "over_passes": over_passes, "peak_bytes": 700_000_000,
        "reference_peak_bytes": 900_000_000, "peak_ratio": peak_ratio,
    }  # fmt: skip
    page = bench.report([row], 2)
    assert f"| grasp | 100 | 3.46 s | 3.10 s | {over_passes:.3f}x | 6.00 s |" in page
    assert f"| grasp | 100 | 700 MB | 900 MB | {peak_ratio:.2f}x |" in page
    assert page.count("**missed**") == missed
    assert page.count("| met |") == 2 - missed
    timed = {key: value for key, value in row.items() if "peak" not in key}
    assert "Peak memory" not in bench.report([timed], 2)


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    held = json.loads((bench.RESULTS / "gradient.json").read_text())
    assert bench.PAGE.read_text() == bench.report(held["rows"], held["threads"])
