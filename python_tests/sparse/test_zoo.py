"""The models of the zoo, and transformers' GPT-2, packed and made dense again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from python_tests.sparse import nets

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the embedding.*shares it:paikern.errors.PaikernWarning"
)

MODELS: dict[str, dict[str, Any]] = {
    "lenet300": {},
    "resnet20": {},
    "resnet18": {"num_classes": 10},
    "vit_b_16": {"image_size": 32, "layers": 2, "dim": 48, "heads": 3, "num_classes": 7},
    "gpt2": {"vocabulary": 101, "layers": 2, "dim": 32, "heads": 2},
    "gpt2-conv1d": {"vocabulary": 101, "layers": 2, "dim": 32, "heads": 2, "conv1d": True},
    "llama-tiny": {},
}
# Weights that stay dense: attention reads its projections itself.
DENSE = ("in_proj_weight", "self_attention.out_proj.weight")


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_back(name: str) -> None:
    model = pk.zoo.create(name.removesuffix("-conv1d"), seed=0, **MODELS[name]).eval()
    masks = nets.random_masks(model)
    x = pk.zoo.example_input(model, batch=2)
    keys = list(model.state_dict())
    pk.sparsify(model, masks, force=True)
    packed = [row.name for row in pk.explain(model).layers if row.packed]
    assert packed == [name for name in masks if not name.endswith(DENSE)]
    masks.verify(model)
    assert pk.MaskSet.from_model(model) == masks
    dense = pk.densify(copy.deepcopy(model))
    assert list(dense.state_dict()) == keys
    nets.assert_equal(dense.state_dict(), nets.dense_state(model))
    assert pk.MaskSet.from_model(dense) == masks
    with torch.no_grad():
        found, expected = model(x), dense(x)
        exact = copy.deepcopy(dense).double()(x.double() if x.is_floating_point() else x)
    # No further from float64 than the dense model is, but for a rounding in another order.
    scale = exact.abs().max()
    allowed = (expected - exact).abs().max() + 1e-5 * scale
    assert (found - exact).abs().max() <= allowed


def test_transformers_gpt2_trains() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=61,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(0)
    dense = transformers.GPT2LMHeadModel(config)
    masks = nets.random_masks(dense)
    assert len(masks) == 8
    keys = list(dense.state_dict())
    packed = pk.sparsify(copy.deepcopy(dense), masks, force=True)
    assert sum(isinstance(m, pk.MaskedConv1D) for m in packed.modules()) == 8
    tokens = torch.randint(61, (4, 12), generator=torch.Generator().manual_seed(0))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3)
    masks.attach(dense, optimizer)
    expected = train(dense, optimizer)
    found = train(packed, torch.optim.AdamW(packed.parameters(), lr=1e-3))
    assert found == pytest.approx(expected, rel=1e-3)
    assert found[-1] < 0.9 * found[0]
    masks.verify(packed)
    generated = packed.generate(tokens[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (4, 8)
    back = pk.densify(packed)
    assert list(back.state_dict()) == keys
    assert isinstance(back.transformer.h[0].attn.c_attn, type(dense.transformer.h[0].attn.c_attn))
