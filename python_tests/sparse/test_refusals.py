"""What packed weights refuse, and with which words; what a refusal leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import paikern as pk


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.fixture(scope="module")
def masks() -> pk.MaskSet:
    return pk.prune(dense(), "magnitude", sparsity=0.9)


@pytest.fixture
def packed(masks: pk.MaskSet) -> nn.Module:
    return pk.sparsify(dense(), masks, force=True)


def test_attach_refuses_an_optimizer_from_before_sparsify(masks: pk.MaskSet) -> None:
    model = dense()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = pk.sparsify(model, masks, force=True)
    with pytest.raises(ValueError, match=r"does not hold '0\.weight\.values'.*pass optimizer="):
        masks.attach(model, optimizer)
    with pytest.raises(ValueError, match="does not hold"):
        masks.attach(model, torch.optim.SGD(dense().parameters(), lr=0.1))


def test_attach_takes_an_optimizer_of_some_layers(masks: pk.MaskSet, packed: nn.Module) -> None:
    masks.attach(packed, torch.optim.SGD(packed.parameters(), lr=0.1)).remove()
    masks.attach(packed, torch.optim.SGD(packed[2].parameters(), lr=0.1)).remove()


def test_values_without_their_mask_are_loaded(packed: nn.Module) -> None:
    state = {name: p.detach() + 1 for name, p in packed.named_parameters()}
    result = packed.load_state_dict(state, strict=False)
    assert result.missing_keys == ["0.weight.mask", "2.weight.mask"]
    assert torch.equal(packed[0].weight.values, state["0.weight.values"])
    with pytest.raises(RuntimeError, match="must be tensors, got int and int"):
        packed.load_state_dict({"0.weight.values": 1, "0.weight.mask": 2}, strict=False)


def test_a_packed_weight_of_another_layer() -> None:
    other = pk.PackedWeight.from_dense(torch.randn(5, 7), torch.ones(5, 7).bool())
    with pytest.raises(ValueError, match=r"Linear needs a weight of shape \(2, 3\), got \(5, 7\)"):
        pk.MaskedLinear.from_linear(nn.Linear(3, 2), weight=other)
    with pytest.raises(ValueError, match=r"mask must be a tensor of shape \(2, 3\), got list"):
        pk.MaskedLinear.from_linear(nn.Linear(3, 2), [True])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a dense layer with a weight, got NoneType"):
        pk.MaskedConv2d.from_conv(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("force", [False, True], ids=["dense", "packed"])
def test_nan_in_a_kept_weight(force: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    masks = pk.prune(copy.deepcopy(model), "magnitude", sparsity=0.5)
    kept, pruned = masks["0.weight"].nonzero()[0], (~masks["0.weight"]).nonzero()[0]
    with torch.no_grad():
        model[0].weight[tuple(pruned)] = float("nan")
    pk.sparsify(copy.deepcopy(model), masks, force=force)  # what is pruned may hold anything
    with torch.no_grad():
        model[0].weight[tuple(kept)] = float("nan")
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"sparsify: '0\.weight'.*NaN"):
        pk.sparsify(model, masks, force=force)
    assert torch.equal(model[0].weight.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("empty", [False, True], ids=["meta", "to_empty"])
def test_positions_without_content(packed: nn.Module, empty: bool) -> None:
    held = packed.state_dict()
    model = copy.deepcopy(packed).to("meta")
    if empty:
        model = model.to_empty(device="cpu")
        with pytest.raises(ValueError, match="positions, without content"):
            pk.densify(model)
    with pytest.raises(RuntimeError, match=r"load weight\.values and weight\.mask"):
        model.load_state_dict(dense().state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"from_model: '0\.weight' is on the meta device"):
        pk.MaskSet.from_model(model)
    model.load_state_dict(held, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(model(x), packed(x))


def test_arguments_of_another_kind(masks: pk.MaskSet, packed: nn.Module) -> None:
    with pytest.raises(TypeError, match="force must be True or False, got 'yes'"):
        pk.sparsify(dense(), masks, "yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="training must be True or False, got 'no'"):
        pk.explain(packed, training="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparsify: the model does not run on example_inputs"):
        pk.sparsify(dense(), masks, example_inputs=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"pack_keys: 0\.weight must be a tensor, got int"):
        pk.pack_keys(packed, {"0.weight": 1})
    with pytest.raises(ValueError, match="shape must be"):
        pk.PackedWeight(torch.ones(3), torch.ones(1, dtype=torch.uint8), "ab")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gather: dense must be a dense"):
        packed[0].weight.gather(None)
