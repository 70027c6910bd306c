"""Scores: dense and factored entries, exponents, shapes."""

from __future__ import annotations

import pytest
import torch

import paikern as pk
from paikern.scores import Dense, Factored, Scores


def test_a_mapping_in_parameter_order() -> None:
    entries = {"b": Dense(torch.ones(2)), "a": Dense(torch.zeros(3, 2))}
    scores = Scores(entries, {"a": (3, 2), "b": (2,), "c": (9,)})
    assert list(scores) == ["b", "a"]
    assert len(scores) == 2
    assert scores["a"] is entries["a"]
    assert scores.total == 8
    assert scores.shapes == {"b": (2,), "a": (3, 2)}
    assert repr(scores) == "Scores(b: Dense, a: Dense)"
    with pytest.raises(KeyError):
        scores["c"]


def test_dense_applies_sign_and_exponent() -> None:
    scores = Scores(
        {
            "a": Dense(torch.tensor([-2.0, 3.0]), absolute=True),
            "b": Dense(torch.tensor([0.0, -1.0, 1.5]), exponent=-2),
        },
        {"a": (2, 1), "b": (3,)},
    )
    assert scores.dense("a").tolist() == [[2.0], [3.0]]
    assert scores.dense("b").tolist() == [0.0, -0.25, 0.375]
    assert scores.dense("b", relative_to=-3).tolist() == [0.0, -2.0, 3.0]
    assert scores.exponent == 0


@pytest.mark.parametrize("exponent", [130, 1500, -160, -1500])
def test_exponents_beyond_the_range_of_floats(exponent: int) -> None:
    """Zeros stay 0 (never NaN); the rest becomes infinite or 0, and is whole in relation."""
    scores = Scores({"a": Dense(torch.tensor([0.0, 1.5]), exponent=exponent)}, {"a": (2,)})
    zero, value = scores.dense("a").tolist()
    assert zero == 0.0
    assert value == (torch.inf if exponent > 0 else 0.0)
    assert scores.exponent == exponent
    assert scores.dense("a", relative_to=exponent).tolist() == [0.0, 1.5]


def test_factored_is_the_outer_product() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    a, g = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 10.0])
    mask = pk.ops.pack_mask(torch.tensor([[True, True], [False, True]]))
    entry = Factored(weight, 2, a, g, exponent=1, mask=mask)
    assert entry.dense(-1.0).values.tolist() == [[2.0, 4.0], [-1.0, 2.5]]
    scores = Scores({"w": entry}, {"w": (2, 2)})
    assert scores.dense("w").tolist() == [[4.0, 8.0], [0.0, 5.0]]
    assert scores.dense("w", torch.float64).dtype == torch.float64


def test_factored_selects_as_dense() -> None:
    generator = torch.Generator().manual_seed(3)
    entries, dense, shapes = {}, {}, {}
    for i, (o, n) in enumerate([(7, 33), (31, 5), (1, 64)]):
        entry = Factored(
            torch.randn(o, n, generator=generator),
            1,
            torch.rand(n, generator=generator),
            torch.rand(o, generator=generator),
            exponent=[0, 90, -200][i],
        )
        entries[str(i)], dense[str(i)], shapes[str(i)] = entry, entry.dense(), (o, n)
    for sparsity in (0.1, 0.5, 0.9):
        found = pk.select(Scores(entries, shapes), sparsity=sparsity, on_collapse="floor")
        expected = pk.select(Scores(dense, shapes), sparsity=sparsity, on_collapse="floor")
        mixed = pk.select(
            Scores({**entries, "1": dense["1"]}, shapes), sparsity=sparsity, on_collapse="floor"
        )
        assert found == expected == mixed
