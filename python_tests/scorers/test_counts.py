"""Exact counts of every method that reads data or removes channels, at the ends of the scale."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from python_tests.scorers.data_nets import assert_same_state, prepared, state_of

ROWS = pk.methods()
DATA = [row["name"] for row in ROWS if row["needs_data"] and not row["structured"]]
CHANNELS = [row["name"] for row in ROWS if row["structured"]]
GENERATOR = torch.Generator().manual_seed(6)
X, Y = torch.randn(8, 3, 6, 6, generator=GENERATOR), torch.arange(8) % 4


class Grouped(nn.Module):
    """Plain, grouped, depthwise and grouped transposed convolutions; 576 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.o = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.d = nn.ConvTranspose2d(8, 12, 2, groups=4)
        self.e = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.o(self.b(torch.relu(self.n(self.a(x))))))
        return self.e(torch.relu(self.d(torch.relu(self.c(x)))).mean((2, 3)))


TOTAL = 216 + 144 + 72 + 96 + 48


def prune(method: str, **options: Any) -> pk.MaskSet:
    torch.manual_seed(0)
    model = prepared(Grouped())
    given = {"batches": 1} if method.startswith("prospr") else {}
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pk.PaikernWarning)
        masks = pk.prune(
            model, method, data=(X, Y), apply=False, progress=False, **given, **options
        )
    assert_same_state(model, before)
    assert masks.total == TOTAL
    return masks


@pytest.mark.parametrize("method", [*DATA, *CHANNELS])
@pytest.mark.parametrize("nothing", [{"sparsity": 0}, {"density": 1.0}, {"amount": 0}], ids=str)
def test_nothing_is_removed(method: str, nothing: dict[str, Any]) -> None:
    assert prune(method, **nothing).kept == TOTAL


@pytest.mark.parametrize("method", DATA)
def test_counts_by_scope(method: str) -> None:
    assert prune(method, sparsity=0.5, scope="global").kept == TOTAL // 2
    local = prune(method, sparsity=0.5, scope="local").kept_by_layer
    assert list(local.values()) == [108, 72, 36, 48, 24]
    erk = prune(method, sparsity=0.5, scope="erk")
    assert list(erk.kept_by_layer.values()) == pk.budget.layer_budget(erk.shapes, 0.5, "erk")
    assert erk.kept == TOTAL // 2
    rows = prune(method, sparsity=0.5, scope="row")
    for name, kept in (("a", 14), ("b", 9), ("c", 5), ("e", 6)):  # of 27, 18, 9, 12
        assert set(rows[f"{name}.weight"].flatten(1).sum(1).tolist()) == {kept}
    outputs = rows["d.weight"].view(4, 2, 3, 4).transpose(1, 2).reshape(12, 8)
    assert set(outputs.sum(1).tolist()) == {4}


@pytest.mark.parametrize("method", DATA)
@pytest.mark.parametrize(
    "least", [{"sparsity": 1 - 2**-53}, {"density": 1e-30}, {"compression": 1e30}], ids=str
)
def test_one_weight_is_the_least(method: str, least: dict[str, Any]) -> None:
    if method in ("px", "ntk_sap"):  # what is left of rounds with so little
        with pytest.raises(pk.PaikernError, match=r"no path (is left|is open|from)"):
            prune(method, scope="global", **least)
        return
    assert prune(method, scope="global", **least).kept == 1
    assert list(prune(method, scope="local", **least).kept_by_layer.values()) == [1] * 5


@pytest.mark.parametrize("method", CHANNELS)
@pytest.mark.parametrize("least", [{"sparsity": 1 - 2**-53}, {"density": 1e-30}], ids=str)
def test_one_channel_of_a_group_is_the_least(method: str, least: dict[str, Any]) -> None:
    masks = prune(method, **least)
    assert all(kept > 0 for kept in masks.kept_by_layer.values())
    assert masks.kept == prune(method, sparsity=0.999).kept


@pytest.mark.parametrize("method", [*DATA, *CHANNELS])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), the fraction removed; got 1\.0"),
        ({"density": 0}, r"density must be in \(0, 1\], the fraction kept; got 0"),
        ({"amount": TOTAL}, r"amount must be in \[0, \d+\), the weights to remove; got 576"),
        ({"compression": float("inf")}, "compression must be a finite factor"),
    ],
    ids=str,
)
def test_nothing_left_is_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(pk.SparsityError, match=message):
        prune(method, **options)


@pytest.mark.parametrize("method", CHANNELS)
@pytest.mark.parametrize("scope", ["erk", "row", "lamp"])
def test_scopes_of_single_weights_are_refused(method: str, scope: str) -> None:
    with pytest.raises(ValueError, match=rf"scope='{scope}': {method} removes whole channels; use"):
        prune(method, sparsity=0.5, scope=scope)
