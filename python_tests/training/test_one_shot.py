"""Any method of pk.prune at a chosen epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paikern as pk
from python_tests.training import nets


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {}),
        ("magnitude", {"scope": "erk"}),
        ("random", {}),
        ("snip", {"batches": 2, "batch_size": 8}),
        ("synflow", {"rounds": 5}),
    ],
)
@pytest.mark.parametrize("at", [1, 3])
def test_same_masks_as_pruning_then(method: str, options: dict[str, Any], at: int) -> None:
    model = nets.make("residual")
    opt = nets.sgd(model)
    data = nets.samples("residual")
    pruner = pk.pruner(
        "one_shot",
        model,
        sparsity=0.8,
        epochs=4,
        optimizer=opt,
        data=data,
        seed=7,
        at=at,
        method=method,
        method_options=options,
    )
    for epoch in range(1, 5):
        nets.train_epoch(model, opt, "residual")
        if epoch == at:
            expected = pk.prune(
                model, method, sparsity=0.8, data=data, seed=7, apply=False, **options
            )
        event = pruner.on_epoch_end(model)
        assert event.pruned == (epoch == at)
        assert event.kept == (pruner.total if epoch < at else expected.kept)
        if epoch >= at:
            assert pruner.masks == expected
            pruner.masks.verify(model)
    assert pruner.masks.metadata["method"] == method
    assert pruner.masks.metadata["epoch"] == at


def test_other_data_than_at_first() -> None:
    model = nets.make("mlp")
    first, other = nets.samples("mlp"), nets.samples("mlp", seed=9)
    pruner = pk.pruner("one_shot", model, sparsity=0.5, epochs=1, method="snip", data=first)
    expected = pk.prune(model, "snip", sparsity=0.5, data=other, apply=False)
    pruner.on_epoch_end(model, data=other)
    assert pruner.masks == expected


def test_broken_weights_name_the_epoch() -> None:
    model = nets.make("mlp")
    pruner = pk.pruner("one_shot", model, sparsity=0.5, epochs=2, at=2)
    pruner.on_epoch_end(model)
    with torch.no_grad():
        model[1].weight[0, 0] = float("inf")
    with pytest.raises(pk.NonFiniteScoreError, match=r"epoch 2: 1\.weight holds 1 NaN or inf"):
        pruner.on_epoch_end(model)
    assert pruner.pruned_at is None


def test_at_must_be_an_epoch() -> None:
    with pytest.raises(ValueError, match=r"at must be in \[1, 3\], got 4"):
        pk.pruner("one_shot", nets.mlp(), sparsity=0.5, epochs=3, at=4)


def test_a_loader_with_a_generator_of_its_own() -> None:
    data = torch.utils.data.TensorDataset(*nets.samples("mlp"))
    masks = []
    for start in (1, 2):
        own = torch.Generator().manual_seed(start)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=own)
        before = own.get_state()
        options = {"method": "snip", "method_options": {"batches": 1}, "data": loader, "seed": 5}
        pruner = pk.pruner("one_shot", nets.make("mlp"), sparsity=0.8, epochs=1, **options)
        pruner.on_epoch_end()
        assert torch.equal(own.get_state(), before)
        masks.append(pruner.masks)
    assert masks[0] == masks[1]
