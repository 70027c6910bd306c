"""Batch norms without an offset, and norms that are called by keyword."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from python_tests.scorers.data_nets import Residual, assert_same_state, prepared, state_of

X, Y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(6)), torch.arange(8) % 4
METHODS = ("gate_decorators", "ntk_sap", "snap", "earlybird", "grasp")


class ByKeyword(Residual):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(input=self.stem(input=x)))
        x = torch.relu(self.norm2(input=self.body(input=x)) + self.short(input=x))
        x = torch.relu(self.norm3(input=self.wide(input=x)))
        return self.head(input=x.mean((2, 3)))


def scores(model: nn.Module, method: str) -> dict[str, Tensor]:
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pk.PaikernWarning)
        found = pk.score(model, method, data=(X, Y))
    assert_same_state(model, before)
    return {name: found.dense(name) for name in found}


@pytest.mark.parametrize("method", METHODS)
def test_norms_without_offset_are_norms_with_an_offset_of_0(method: str) -> None:
    models = []
    for bare in (True, False):
        torch.manual_seed(0)
        model = prepared(Residual())
        for norm in (model.norm1, model.norm2, model.norm3):
            if bare:
                norm.register_parameter("bias", None)
            else:
                nn.init.zeros_(norm.bias)
        models.append(scores(model, method))
    for name, expected in models[1].items():
        torch.testing.assert_close(models[0][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_norms_that_are_called_by_keyword(method: str) -> None:
    found = []
    for kind in (ByKeyword, Residual):
        torch.manual_seed(0)
        found.append(scores(prepared(kind()), method))
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, rtol=0, atol=0)
