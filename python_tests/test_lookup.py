"""Names and options that are unknown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern._lookup import by_name, check_options, nearest

TABLE = {"synflow": 1, "grasp_it": 2}
GIVEN = {"parameter": "method", "what": "method", "example": "snip", "fix": "see the list"}


@pytest.mark.parametrize("name", ["grasp_it", "grasp-it", "GraSP-It", "GRASP_IT"])
def test_capitals_and_hyphens_do_not_count(name: str) -> None:
    assert by_name(TABLE, name, **GIVEN) == 2


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"^method: unknown method 'synflo'; did you") as told:
        by_name(TABLE, "synflo", **GIVEN)
    assert str(told.value) == (
        "method: unknown method 'synflo'; did you mean 'synflow'? Available: grasp_it, synflow"
    )
    with pytest.raises(ValueError, match=r"'q'; see the list Available: grasp_it, synflow, more$"):
        by_name(TABLE, "q", **GIVEN, more=", more")
    assert nearest("q", TABLE) == ""


@pytest.mark.parametrize("name", [3, None, nn.Linear, ["snip"]])
def test_what_is_no_name(name: Any) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"^method: give the name of a method, such as 'snip'; got"):
        pk.prune(net, name, sparsity=0.5)
    with pytest.raises(TypeError, match=r"^pruner: give the name of a method, such as 'asni'; got"):
        pk.pruner(name, net, sparsity=0.5, epochs=1)
    assert torch.count_nonzero(net.weight) == 4


def test_options() -> None:
    check_options("method", "m", {"alpha"}, {"alpha": 1})
    with pytest.raises(ValueError, match=r"^alhpa: method 'm' has no such option; did you") as told:
        check_options("method", "m", {"alpha", "beta"}, {"alhpa": 1})
    assert str(told.value).endswith("did you mean 'alpha'? its options: alpha, beta")
    with pytest.raises(ValueError, match=r"^q: pruner 'p' has no such option; its options: none$"):
        check_options("pruner", "p", (), {"q": 1})
