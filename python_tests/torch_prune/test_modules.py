"""Pruned modules among everything else that PyTorch does with modules."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import paikern.torch_prune as prune
from paikern import MaskSet
from paikern.torch_prune.buffers import MaskedBuffers


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    pairs = [(net[0], "weight"), (net[3], "weight"), (net[0], "bias")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.5)
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


# --- layers that read their weights in their own way ---------------------------------------------


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    module = kind(4, 6, num_layers=2)
    prune.l1_unstructured(module, "weight_ih_l0", 0.5)
    flat = module._flat_weights
    assert sum(isinstance(p, nn.Parameter) for p in flat) == len(flat) - 1
    prune.random_unstructured(module, "weight_hh_l1", 0.5)
    twin = kind(4, 6, num_layers=2)
    sequence = torch.randn(7, 3, 4)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(getattr(module, name))
        assert torch.equal(module(sequence)[0], twin(sequence)[0])
        optimizer.zero_grad()
        module(sequence)[0].sum().backward()
        optimizer.step()
    assert int((module.weight_ih_l0 == 0).sum()) == module.weight_ih_l0.numel() // 2
    with torch.no_grad():  # with a history, deepcopy of recurrent layers refuses their list
        assert torch.equal(copy.deepcopy(module)(sequence)[0], module(sequence)[0])
    y = module(sequence)[0]
    prune.remove(module, "weight_ih_l0")
    prune.remove(module, "weight_hh_l1")
    assert all(isinstance(p, nn.Parameter) for p in module._flat_weights)
    assert "weight_ih_l0" in dict(module.named_parameters())
    assert "weight_ih_l0_orig" not in dict(module.named_parameters())
    assert torch.equal(module(sequence)[0], y)


def test_attention_trains_its_output_projection() -> None:
    module = nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(module, "in_proj_weight", 0.5)
    prune.l1_unstructured(module.out_proj, "weight", 0.5)  # read without a call of `out_proj`
    before = module.out_proj.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    s = torch.randn(3, 2, 8)
    for _ in range(2):
        optimizer.zero_grad()
        module(s, s, s)[0].square().sum().backward()
        optimizer.step()
    after = module.out_proj.weight
    assert not torch.equal(after, before)
    assert int((after == 0).sum()) == 32
    assert int((module.in_proj_weight == 0).sum()) == 96


def test_transformer_layer_in_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for module in (layer.linear1, layer.linear2, layer.self_attn.out_proj):
        prune.l1_unstructured(module, "weight", 0.5)
    s = torch.randn(3, 5, 8)
    slow = layer(s)
    with torch.no_grad():
        assert torch.allclose(layer(s), slow, atol=1e-5)


def test_sparse_embedding() -> None:
    module = prune.l1_unstructured(nn.Embedding(10, 4, sparse=True), "weight", 0.5)
    module(torch.tensor([1, 2])).sum().backward()
    gradient = module.weight_orig.grad
    assert gradient.is_sparse
    expected = torch.zeros(10, 4)
    expected[1:3] = module.weight_mask[1:3]
    assert torch.equal(gradient.to_dense(), expected)


def test_channels_last() -> None:
    module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    for amount in (0.5, 0.5):
        prune.l1_unstructured(module, "weight", amount)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module.weight, module.weight_orig * module.weight_mask)
    assert int(module.weight_mask.sum()) == 54


def test_autocast() -> None:
    module = prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(torch.ones(2, 6))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert torch.equal(module.weight_orig.grad != 0, module.weight_mask != 0)


def test_inference_mode_leaves_nothing_behind(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(6, 4))
    with torch.inference_mode():
        prune.l1_unstructured(net[0], "weight", 0.5)
        net[0].weight_mask[0] = 0
        net(x)
    net(x).sum().backward()
    assert not net[0].weight_orig.grad[0].any()
    assert torch.equal(net[0].weight_orig.grad != 0, net[0].weight_mask != 0)


# --- parametrizations ----------------------------------------------------------------------------


class Squared(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * w


def test_another_parameter_may_be_parametrized(x: Tensor) -> None:
    module = nn.Linear(6, 4)
    parametrize.register_parametrization(module, "weight", Squared())
    prune.l1_unstructured(module, "bias", 2)
    assert int((module.bias == 0).sum()) == 2
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_what_is_below_a_parametrization_may_be_pruned(x: Tensor) -> None:
    module = nn.Linear(6, 4)
    parametrize.register_parametrization(module, "weight", Squared())
    prune.l1_unstructured(module.parametrizations.weight, "original", 0.5)
    assert int((module.weight == 0).sum()) == 12
    module(x).sum().backward()


def test_the_original_may_be_parametrized_afterwards(x: Tensor) -> None:
    module = prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5)
    weight = module.weight_orig.detach().square() * module.weight_mask
    parametrize.register_parametrization(module, "weight_orig", Squared())
    y = module(x)
    assert torch.equal(y, functional.linear(x, weight, module.bias))
    y.sum().backward()
    gradient = module.parametrizations.weight_orig.original.grad
    assert torch.equal(gradient != 0, module.weight_mask != 0)


def test_a_parametrized_weight_is_refused(x: Tensor) -> None:
    module = nn.Linear(6, 4)
    parametrize.register_parametrization(module, "weight", Squared())
    with pytest.raises(TypeError, match="parametrized weight can be pruned once"):
        prune.l1_unstructured(module, "weight", 0.5)
    module = prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5)
    parametrize.register_parametrization(module, "weight", Squared())
    with pytest.raises(ValueError, match="parametrize weight_orig instead"):
        module(x)


def test_lazy_modules() -> None:
    module = nn.LazyLinear(4)
    with pytest.raises(ValueError, match="has no shape yet; run a forward pass first"):
        prune.l1_unstructured(module, "weight", 0.5)
    module(torch.ones(1, 3))
    prune.l1_unstructured(module, "weight", 0.5)


# --- tracers and functional transforms -----------------------------------------------------------


def test_compile(x: Tensor) -> None:
    net = small_net()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        expected = net[0].weight_orig.grad.clone()
        optimizer.zero_grad()
        y = compiled(x)
        assert torch.allclose(y, net(x), atol=1e-6)
        y.square().sum().backward()
        assert torch.allclose(net[0].weight_orig.grad, expected, atol=1e-5)
        assert not net[0].weight_orig.grad[net[0].weight_mask == 0].any()
        optimizer.step()
    net[0].weight_mask[:4] = 0
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    mask = net[0].weight_mask  # held while compiled code runs
    mask[4:] = 0
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    assert not net[0].weight.any()


@pytest.mark.parametrize("strict", [False, True])
def test_export(x: Tensor, strict: bool) -> None:
    net = small_net()
    held = net[0].weight_mask
    exported = torch.export.export(net, (x,), strict=strict).module()
    assert torch.allclose(exported(x), net(x), atol=1e-6)
    assert isinstance(net[0]._buffers, MaskedBuffers)
    assert net[0].weight_mask is held
    net[0].weight_mask[0] = 0
    assert not net[0].weight[0].any()


def test_jit_trace(x: Tensor) -> None:
    net = small_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, (x,))
    assert torch.allclose(traced(x), net(x), atol=1e-6)


def test_fx(x: Tensor) -> None:
    net = small_net()
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))


def test_functional_call(x: Tensor) -> None:
    net = small_net()
    state = dict(net.named_parameters()) | dict(net.named_buffers())
    assert torch.equal(torch.func.functional_call(net, state, (x,)), net(x))
    before = net[0].weight_mask.clone()
    state["0.weight_mask"] = torch.ones(8, 6)
    dense = copy.deepcopy(net)
    dense[0].weight_mask.fill_(1)
    assert torch.equal(torch.func.functional_call(net, state, (x,)), dense(x))
    assert torch.equal(net[0].weight_mask, before)


def test_function_transforms(x: Tensor) -> None:
    net = small_net()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(state: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, state, (x,)).square().sum()

    net(x).square().sum().backward()
    gradients = torch.func.grad(loss)(parameters)
    assert torch.allclose(gradients["0.weight_orig"], net[0].weight_orig.grad, atol=1e-5)
    value, slope = torch.func.jvp(loss, (parameters,), (gradients,))
    squares = sum(g.square().sum() for g in gradients.values())
    assert torch.allclose(value, loss(parameters))
    assert torch.allclose(slope, squares, rtol=1e-4)
    batch = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    assert torch.allclose(torch.vmap(loss)(batch)[0], value)


def test_ensembles(x: Tensor) -> None:
    nets = [small_net() for _ in range(3)]
    for index, net in enumerate(nets):
        net[0].weight_mask[index] = 0
    parameters, buffers = torch.func.stack_module_state(nets)

    def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(nets[0], (p, b), (x,))

    outputs = torch.vmap(call)(parameters, buffers)
    for net, y in zip(nets, outputs, strict=True):
        assert torch.allclose(net(x), y, atol=1e-5)


# --- copies of models ----------------------------------------------------------------------------


def test_replicas_as_data_parallel_makes_them(x: Tensor) -> None:
    module = prune.l1_unstructured(nn.Linear(6, 4), "weight", 0.5)
    buffers = list(module.buffers())
    assert [b is c for b, c in zip(buffers, module.buffers(), strict=True)] == [True]
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter.clone())
    for name, buffer in module.named_buffers():
        setattr(replica, name, buffer.clone())
    y = replica(x)
    assert torch.equal(y, module(x))
    y.sum().backward()
    assert torch.equal(module.weight_orig.grad != 0, module.weight_mask != 0)
    replica.weight_mask.fill_(0)
    assert int(module.weight_mask.sum()) == 12


def test_distributed(x: Tensor, tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        net = small_net().train()
        wrapped = nn.parallel.DistributedDataParallel(net)
        wrapped(x).square().sum().backward()
        gradient = net[0].weight_orig.grad
        assert not gradient[net[0].weight_mask == 0].any()
        assert gradient.any()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(x: Tensor, use_buffers: bool) -> None:
    net = small_net()
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=use_buffers)
    mask = net[0].weight_mask.clone()
    for _ in range(3):
        with torch.no_grad():
            net[0].weight_orig.mul_(2)
        averaged.update_parameters(net)
    average = averaged.module[0]
    assert torch.equal(average.weight_mask, mask)
    assert torch.allclose(average.weight, net[0].weight * (1 + 2 + 4) / 3 / 4)


def test_flat_vectors() -> None:
    net = small_net()
    vector = nn.utils.parameters_to_vector(net.parameters()).detach()
    original = net[3].weight_orig.detach().clone()
    nn.utils.vector_to_parameters(vector * 2, net.parameters())
    assert torch.equal(net[3].weight_orig, original * 2)
    assert torch.equal(net[3].weight, net[3].weight_orig * net[3].weight_mask)
    assert nn.utils.parameters_to_vector(net[3].buffers()).tolist() == (
        net[3].weight_mask.flatten().tolist()
    )


# --- mask sets -----------------------------------------------------------------------------------


def test_mask_sets_read_pruned_models(x: Tensor) -> None:
    net = small_net()
    masks = MaskSet.from_model(net)
    assert list(masks) == ["0.weight", "3.weight"]
    for name in masks:
        assert torch.equal(masks[name], net.get_submodule(name[0]).weight_mask != 0)
    masks.verify(net)
    y = net(x)
    masks.apply(net)  # zeroes the originals as well
    assert torch.equal(net(x), y)
    assert torch.equal(net[0].weight, net[0].weight_orig)


def test_mask_sets_are_handed_to_pruned_models() -> None:
    net = small_net()
    before = MaskSet.from_model(net)
    more = MaskSet.from_bool({name: torch.rand(m.shape) < 0.5 for name, m in before.items()})
    more.to_torch_prune(net)
    after = MaskSet.from_model(net)
    for name in before:
        assert torch.equal(after[name], before[name] & more[name])
    (hook,) = (h for h in net[3]._forward_pre_hooks.values())
    assert isinstance(hook, prune.PruningContainer)


def test_a_mask_set_made_here_fits_a_fresh_model(x: Tensor) -> None:
    net = small_net()
    masks = MaskSet.from_model(net)
    fresh = small_net()
    for module, names in ((fresh[0], ("weight", "bias")), (fresh[3], ("weight",))):
        for name in names:
            prune.remove(module, name)
    masks.apply(fresh)
    assert torch.equal(fresh(x), net(x))
