"""`data=`: what counts as samples, in which form, and how often it can be read."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from paikern.batches import Batches

X, Y = torch.arange(15.0).reshape(5, 3), torch.arange(5)


def sizes(data: object, size: int = 2) -> list[int]:
    return [len(x) for x, _ in Batches(data, size)]


def whole(data: object) -> Tensor:
    return torch.cat([x for x, _ in Batches(data, 2)])


@pytest.mark.parametrize(
    "data",
    [
        X,
        (X, Y),
        [X, Y],
        [X[:2], X[2:]],
        [(X[:3], Y[:3]), (X[3:], Y[3:])],
        DataLoader(TensorDataset(X, Y), batch_size=2),
        DataLoader(TensorDataset(X), batch_size=4),
        [X[:0], X],
    ],
    ids=["tensor", "pair", "pair list", "batches", "pairs", "loader", "no labels", "empty batch"],
)
def test_every_form_gives_the_same_samples_twice(data: object) -> None:
    batches = Batches(data, 2)
    for _ in range(2):
        assert torch.equal(torch.cat([x for x, _ in batches]), X)


def test_iterator_can_be_read_again() -> None:
    batches = Batches(iter([X[:1], X[1:]]))
    assert [len(x) for x, _ in batches] == [len(x) for x, _ in batches] == [1, 4]


def test_iterator_without_an_end_is_read_as_far_as_needed() -> None:
    batches = Batches(itertools.cycle([(X, Y), (X + 1, Y)])).samples()
    assert [float(batch.inputs[0, 0]) for batch in itertools.islice(batches, 3)] == [0, 1, 0]


def test_keyword_inputs_are_cut_into_batches_with_their_labels() -> None:
    tokens = {"input_ids": Y.reshape(5, 1), "labels": Y, "use_cache": False}
    for data in (tokens, [tokens], [(tokens, Y)]):
        found = list(Batches(data, 2).samples())
        assert [batch.size for batch in found] == ([2, 2, 1] if data is tokens else [5])
        assert torch.cat([batch.targets for batch in found]).tolist() == Y.tolist()
        assert found[0].inputs["use_cache"] is False
    assert sorted(Batches(tokens).example()) == ["input_ids", "use_cache"]


def test_labels_of_any_form_reach_the_loss() -> None:
    boxes = {"boxes": X, "labels": Y}
    (batch,) = Batches([(X, boxes)]).samples()
    assert torch.equal(batch.to(torch.device("cpu")).targets["boxes"], X)


def test_labels_follow_their_samples() -> None:
    for data in ((X, Y), DataLoader(TensorDataset(X, Y), batch_size=2)):
        assert [y.tolist() for _, y in Batches(data, 2) if y is not None] == [[0, 1], [2, 3], [4]]


def test_two_batches_of_one_length_are_no_pair() -> None:
    assert sizes([X, X]) == [5, 5]
    assert sizes([X, X + 1]) == [5, 5]
    assert sizes((X, X)) == [2, 2, 1]  # a tuple is always inputs and labels


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "got int"),
        (TensorDataset(X), r"a DataLoader of a dataset\), got TensorDataset"),
        ({"x": X}, "got dict"),
        (torch.tensor(1.0), "scalar"),
        ([torch.tensor(1.0)], "a batch must be"),
        ([["a"]], "a batch must be"),
        ([], "no sample"),
        (X[:0], "no sample"),
        (Y, "floating point"),
        (X / 0, "NaN or infinite"),
    ],
)
def test_what_is_not_data(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(data)


def test_batch_size_is_positive() -> None:
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        Batches(X, 0)


@pytest.mark.parametrize("kind", [tuple, list])
def test_keyword_inputs_beside_their_labels(kind: type) -> None:
    tokens = {"input_ids": torch.arange(10).reshape(5, 2), "attention_mask": torch.ones(5, 2)}
    batches = list(Batches(kind((tokens, Y)), 2).samples())
    assert [batch.size for batch in batches] == [2, 2, 1]
    assert [batch.targets.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert batches[1].inputs["input_ids"].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(ValueError, match="5 inputs and 4 labels; give one label a sample"):
        Batches((tokens, Y[:4]))
