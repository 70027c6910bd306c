"""Every method on tiny BERT, GPT-2 and Llama, with fused and with plain attention."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.errors import PaikernError
from python_tests.scorers.data_nets import assert_same_state, state_of, transformer
from python_tests.scorers.helpers import agreement

pytestmark = pytest.mark.filterwarnings(
    "ignore:layer collapse:paikern.errors.PaikernWarning",
    "ignore:random_u:paikern.errors.PaikernWarning",
    "ignore:no path from the input:paikern.errors.PaikernWarning",
)
NAMES = ("bert", "gpt2", "llama")
ON_DATA: dict[str, dict[str, Any]] = {
    "snip": {},
    "itersnip": {"rounds": 3},
    "force": {"rounds": 3},
    "grasp": {},
    "grasp_it": {"rounds": 3},
    "crop": {},
    "cropit": {},
    "prospr": {"batches": 1, "steps": 2, "lr": 0.01},
    "ntk_sap": {"rounds": 3},
    "wanda": {},
}
ON_PATHS: dict[str, dict[str, Any]] = {
    "synflow": {"rounds": 5},
    "synflow_l2": {"rounds": 5},
    "logsynflow": {"rounds": 5},
    "dpai": {"steps": 10},
    "npb": {},
    "phew": {},
}


@functools.cache
def built(name: str, attention: str) -> tuple[nn.Module, Any]:
    model, data = transformer(name, attention)
    return model.double(), data


def pruned(name: str, attention: str, method: str, sparsity: float = 0.6) -> pk.MaskSet:
    model, data = built(name, attention)
    before = state_of(model)
    masks = pk.prune(model, method, sparsity=sparsity, data=data, apply=False, **ON_DATA[method])
    assert_same_state(model, before)
    return masks


@pytest.mark.parametrize("method", list(ON_DATA))
@pytest.mark.parametrize("name", NAMES)
def test_data_driven_methods(name: str, method: str) -> None:
    """Exactly k, nothing touched, and the same masks whichever way attention is computed."""
    fused, plain = (pruned(name, attention, method) for attention in ("sdpa", "eager"))
    expected = fused.total - int(0.6 * fused.total)
    if method == "wanda":
        expected = sum(
            m.numel() // n * (n - int(0.6 * n))
            for key, m in fused.items()
            for n in [m.shape[0] if ".c_" in key else m.shape[1]]  # Conv1D is [in, out]
        )
    assert fused.kept == plain.kept == expected
    assert agreement(dict(fused), dict(plain)) >= 0.99


@pytest.mark.parametrize("method", list(ON_PATHS))
@pytest.mark.parametrize("name", NAMES)
def test_path_methods(name: str, method: str) -> None:
    model, data = transformer(name)
    inputs = {key: data[key] for key in ("input_ids", "attention_mask")}
    before = state_of(model)
    masks = pk.prune(
        model, method, sparsity=0.6, example_inputs=inputs, apply=False, **ON_PATHS[method]
    )
    assert_same_state(model, before)
    assert masks.kept == masks.total - int(0.6 * masks.total)


@pytest.mark.parametrize("name", NAMES)
def test_px_says_what_it_misses(name: str) -> None:
    model, data = transformer(name)
    with pytest.raises((PaikernError, ValueError), match=r"px squares its inputs|ReLU"):
        pk.prune(model, "px", sparsity=0.6, data=data, apply=False)


@pytest.mark.parametrize("method", list(ON_DATA))
def test_training_mode_with_dropout(method: str) -> None:
    """Random layers follow the seed, and the caller's random state does not move."""
    model, data = transformer("bert", dropout=True)
    model.train()
    before = state_of(model)
    found = [
        pk.prune(model, method, sparsity=0.6, data=data, seed=3, apply=False, **ON_DATA[method])
        for _ in range(2)
    ]
    assert_same_state(model, before)
    assert agreement(dict(found[0]), dict(found[1])) == 1.0


@pytest.mark.parametrize("method", ["snip", "grasp", "crop", "prospr", "ntk_sap", "wanda"])
def test_frozen_and_half_precision_parts(method: str) -> None:
    """bfloat16 weights are scored; embeddings that are frozen do not matter."""
    model, data = transformer("gpt2")
    model = copy.deepcopy(model).bfloat16()
    model.transformer.wte.requires_grad_(False)
    before = state_of(model)
    masks = pk.prune(model, method, sparsity=0.5, data=data, apply=False, **ON_DATA[method])
    assert_same_state(model, before)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert masks.kept >= masks.total // 2


@pytest.mark.parametrize("method", list(ON_DATA))
def test_masks_train_on(method: str) -> None:
    """What is kept carries a gradient, what is not stays 0."""
    model, data = transformer("llama")
    masks = pk.prune(model, method, sparsity=0.5, data=data, **ON_DATA[method])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = masks.attach(model, optimizer)
    first = model(**data).loss
    for _ in range(3):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    masks.verify(model)
    handle.remove()
    assert model(**data).loss < first
