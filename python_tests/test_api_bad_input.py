"""Bad input: one line that names the thing and the fix; the model is as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from paikern.errors import (
    BackendError,
    MaskFormatError,
    NonFiniteScoreError,
    PathRuleError,
    SparsityError,
)
from python_tests.small_runs import TOTAL, Untouched, net, prune

BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "sparsity 1": (SparsityError, r"sparsity must be in \[0, 1\), .* got 1.0", {"sparsity": 1.0}),
    "sparsity percent": (SparsityError, r"got 90.*; for 90 % write 0.9", {"sparsity": 90}),
    "sparsity negative": (SparsityError, r"sparsity must be in .* got -0.1", {"sparsity": -0.1}),
    "sparsity nan": (SparsityError, r"sparsity must be in .* got nan", {"sparsity": math.nan}),
    "sparsity text": (TypeError, r"sparsity must be a number, got str '0.9'", {"sparsity": "0.9"}),
    "none given": (SparsityError, r"exactly one of .* got none", {"sparsity": None}),
    "two given": (SparsityError, r"got sparsity=0.5 and density=0.5", {"density": 0.5}),
    "no inputs": (
        ValueError, r"example_inputs: method 'synflow' traces .* for instance",
        {"example_inputs": None},
    ),
    "wrong inputs": (
        ValueError, r"example_inputs: Net could not be traced with inputs \(1, 3, 8, 8\)",
        {"example_inputs": torch.ones(1, 3, 8, 8)},
    ),
    "inputs of no use": (
        ValueError, r"example_inputs must be a tensor, a tuple .* got int", {"example_inputs": 3},
    ),
    "variant": (ValueError, r"variant must be one of .* got 'papr'", {"variant": "papr"}),
    "selection": (ValueError, r"selection must be one of .* got 'topk'", {"selection": "topk"}),
    "collapse": (ValueError, r"on_collapse must be one of .* got 'skip'", {"on_collapse": "skip"}),
    "rounds": (ValueError, r"rounds must be >= 1, got 0", {"rounds": 0}),
    "schedule": (ValueError, r"unknown schedule 'exp'", {"schedule": "exp"}),
    "scope": (ValueError, r"unknown scope 'layer'", {"scope": "layer"}),
    "backend": (BackendError, r"backend: unknown backend 'gpu'; available", {"backend": "gpu"}),
    "ignores all": (ValueError, r"ignore", {"ignore": [nn.Conv2d, nn.Linear]}),
    "unknown name": (ValueError, r"ignore: .*'heed'.*head", {"ignore": ["heed"]}),
    "option": (ValueError, r"step: method 'synflow' has no such option", {"step": 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    error, message, options = BAD[case]
    guard = Untouched(net())
    with pytest.raises(error, match=message) as caught:
        prune(guard.model, "synflow", **options)
    assert "\n" not in str(caught.value)
    guard.check()


@pytest.mark.parametrize("method", ["magnitude", "synflow"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights(method: str, bad: float) -> None:
    model = net()
    with torch.no_grad():
        model.body.weight[1, 2, 0, 0] = bad
        model.body.weight[1, 2, 0, 1] = bad
    guard = Untouched(model)
    message = r"body\.weight holds 2 NaN or infinite weights; .* ignore=\['body\.weight'\]"
    with pytest.raises(NonFiniteScoreError, match=message):
        prune(model, method)
    guard.check()
    if method == "magnitude":
        assert prune(model, method, ignore=["body.weight"]).total == TOTAL - 576


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no .* weight to prune"):
        pk.prune(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), "magnitude", sparsity=0.5)


def test_operation_without_a_rule() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.inv(self.inner(x))

    guard = Untouched(Odd())
    with pytest.raises(PathRuleError, match=r"linalg_inv.*register_path_rule"):
        pk.prune(guard.model, "synflow", sparsity=0.5, example_inputs=torch.eye(4)[None])
    guard.check()


def test_masks_of_another_model_are_refused() -> None:
    masks = prune(net(), "magnitude", apply=False)
    other = zoo.create("mlp", sizes=(3, 2))
    with pytest.raises(MaskFormatError, match="the masks belong to another model"):
        pk.score(other, "magnitude", masks=masks)
    with pytest.raises(MaskFormatError, match="the masks belong to another model"):
        pk.analyze(other, masks, example_inputs=torch.ones(1, 3))
