"""scope="row": exact counts in every output, whatever the layout; what it cannot be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.budget import layer_budget
from paikern.pattern import Layout


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 8, 2, groups=2),
        nn.ConvTranspose1d(8, 5, 3), nn.Linear(7, 3), nn.Linear(1, 2),
    )  # fmt: skip


def rows_of(name: str, mask: torch.Tensor) -> torch.Tensor:
    """`[outputs, everything that one of them reads]`."""
    if name == "1.weight":
        return mask.view(2, 3, 4, 2, 2).transpose(1, 2).reshape(8, -1)
    return mask.transpose(0, 1).reshape(5, -1) if name == "2.weight" else mask.flatten(1)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_every_output_keeps_its_best(sparsity: float) -> None:
    model = net()
    masks = pk.prune(model, "magnitude", sparsity=sparsity, scope="row", apply=False)
    for name, mask in masks.items():
        rows = rows_of(name, mask)
        weights = rows_of(name, dict(model.named_parameters())[name].detach().abs())
        inputs = rows.shape[1]
        keep = inputs - int(sparsity * inputs)
        assert rows.sum(1).unique().tolist() == [keep]
        best = torch.zeros_like(rows).scatter_(1, weights.topk(keep).indices, True)
        assert torch.equal(rows, best)


def test_ties_go_to_the_lower_index() -> None:
    scores = pk.Scores({"w": pk.Dense(torch.ones(2, 4))}, {"w": (2, 4)})
    assert pk.select(scores, sparsity=0.5, scope="row")["w"].int().tolist() == [[1, 1, 0, 0]] * 2


def test_product_scores_and_rounds() -> None:
    model = net()[3]
    data = (torch.randn(9, 7), torch.randint(0, 3, (9,)))
    masks = pk.prune(model, "snip", sparsity=0.6, scope="row", rounds=3, data=data, apply=False)
    assert masks["weight"].sum(1).tolist() == [3, 3, 3]
    assert len(masks.metadata["history"]) == 3


def test_budget() -> None:
    shapes = {"a": (3, 7), "b": (6, 4, 2)}
    assert layer_budget(shapes, 0.5, "row") == [12, 24]
    layouts = {"b": Layout(transposed=True, groups=2)}  # 8 outputs of 3 inputs at 2 positions
    assert layer_budget(shapes, 0.9, "row", layouts=layouts) == [3, 8]


def test_verify_knows_the_count(tmp_path: Path) -> None:
    from paikern.cli import main

    out = tmp_path / "out"
    given = ["--model", "lenet300", "--method", "magnitude", "--scope", "row", "--sparsity", "0.9"]
    assert main(["prune", *given, "--out", str(out)]) == 0
    masks = pk.load_masks(out / "masks.safetensors")
    assert masks.kept == 300 * 79 + 100 * 30 + 10 * 10
    assert main(["verify", str(out / "masks.safetensors"), "--model", "lenet300"]) == 0


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpai", {}, "use scope='erk' or scope='local'"),
        ("npb", {}, "scope='row': npb builds its mask"),
        ("magnitude", {"selection": "published"}, "no meaning with scope='row'"),
        ("magnitude", {"pattern": "row"}, "use scope='local'"),
    ],
)
def test_refused(method: str, options: dict[str, str], message: str) -> None:
    model = pk.zoo.create("mlp", sizes=(4, 3, 2))
    with pytest.raises(ValueError, match=message):
        pk.prune(
            model, method, sparsity=0.5, scope="row", example_inputs=torch.ones(1, 4), **options
        )
