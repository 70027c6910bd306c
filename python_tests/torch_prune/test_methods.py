"""The methods themselves: arguments, exact counts, and masks held as bits."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import paikern.torch_prune as prune

WITH_AMOUNT = [
    prune.L1Unstructured,
    prune.RandomUnstructured,
    lambda amount: prune.LnStructured(amount, n=2),
    prune.RandomStructured,
]


@pytest.mark.parametrize("make", WITH_AMOUNT)
def test_amounts_are_checked_at_once(make: object) -> None:
    with pytest.raises(TypeError, match="amount"):
        make("0.5")
    with pytest.raises(ValueError, match="amount"):
        make(1.01)
    with pytest.raises(ValueError, match="amount"):
        make(-1)
    assert make(0.5).amount == 0.5


def test_default_dimension_is_the_last() -> None:
    assert prune.RandomStructured(1).dim == prune.LnStructured(1, 2).dim == -1
    module = nn.Linear(5, 3)
    prune.RandomStructured.apply(module, "weight", 2)
    assert int((module.weight == 0).all(0).sum()) == 2


@pytest.mark.parametrize("kind", ["L1Unstructured", "RandomUnstructured", "CustomFromMask"])
def test_types(kind: str) -> None:
    assert getattr(prune, kind).PRUNING_TYPE == getattr(torch_prune, kind).PRUNING_TYPE
    assert issubclass(getattr(prune, kind), prune.BasePruningMethod)
    assert issubclass(prune.BasePruningMethod, torch_prune.BasePruningMethod)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_random_counts_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    module = nn.Linear(100, 30, dtype=dtype)
    for left in (1500, 750, 375):
        prune.random_unstructured(module, "weight", 0.5)
        assert int((module.weight_mask != 0).sum()) == left
    # 256 values of bfloat16 would leave the choice to the index; so the halves differ little.
    halves = (module.weight_mask != 0).reshape(2, -1).sum(1)
    assert halves.min() > 140  # 187.5 expected, standard deviation 9


@pytest.mark.parametrize("seed", range(5))
def test_random_masks_of_a_seed_are_torchs(seed: int) -> None:
    masks = []
    for library in (torch_prune, prune):
        torch.manual_seed(seed)
        module = nn.Linear(20, 10)
        library.random_unstructured(module, "weight", 0.3)
        library.random_structured(module, "weight", 0.3, dim=0)
        library.random_unstructured(module, "weight", 0.3)
        masks.append(module.weight_mask.clone())
    assert torch.equal(*masks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64], ids=str)
def test_custom_mask(dtype: torch.dtype) -> None:
    mask = torch.eye(3, dtype=dtype)
    method = prune.CustomFromMask(mask)
    assert torch.equal(method.mask, mask)
    assert method.mask.dtype == dtype
    mask.fill_(1)
    assert torch.equal(method.mask, torch.eye(3, dtype=dtype))
    method.mask.fill_(1)  # a copy
    assert torch.equal(method.mask, torch.eye(3, dtype=dtype))
    assert method.compute_mask(torch.ones(3, 3), torch.ones(3, 3)).tolist() == torch.eye(3).tolist()
    assert torch.equal(pickle.loads(pickle.dumps(method)).mask, method.mask)


def test_custom_masks_compose() -> None:
    module = nn.Linear(3, 2)
    prune.custom_from_mask(module, "weight", torch.tensor([[1, 1, 0], [1, 0, 1]]))
    prune.custom_from_mask(module, "weight", torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert module.weight_mask.tolist() == [[0, 1, 0], [1, 0, 1]]


def test_custom_mask_refuses() -> None:
    with pytest.raises(ValueError, match="values other than 0 and 1"):
        prune.CustomFromMask(torch.tensor([0.5]))
    module = nn.Linear(3, 2)
    for shape in [(3, 2), (3,), (1, 3), (6,)]:
        with pytest.raises(AssertionError, match=r"has shape \[2, 3\], the mask"):
            prune.custom_from_mask(module, "weight", torch.ones(shape))
    assert not prune.is_pruned(module)


def test_subclasses_of_built_in_methods() -> None:
    class Half(prune.L1Unstructured):
        def __init__(self) -> None:
            super().__init__(amount=0.5)

        @classmethod
        def apply(cls, module: nn.Module, name: str) -> object:
            return super(prune.L1Unstructured, cls).apply(module, name)

    module = nn.Linear(4, 4)
    Half.apply(module, "weight")
    prune.global_unstructured([(module, "weight")], Half)
    assert int(module.weight_mask.sum()) == 4
