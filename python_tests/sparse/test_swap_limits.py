"""What sparsify, densify and packed layers refuse, and what goes over with a layer."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.sparse import layers
from paikern.zoo.gpt2 import Conv1D
from python_tests.sparse import nets


def snapshot(model: nn.Module) -> tuple[list[object], list[torch.Tensor]]:
    state = [value.clone() for value in model.state_dict().values()]
    return [(name, id(module)) for name, module in model.named_modules()], state


def assert_same(model: nn.Module, before: tuple[list[object], list[torch.Tensor]]) -> None:
    modules, state = snapshot(model)
    assert modules == before[0]
    for found, expected in zip(state, before[1], strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


# --- masks are copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["index", "bitmap"])
def test_masks_handed_out_are_copies(format: str) -> None:
    weight, mask = torch.randn(9, 13), torch.rand(9, 13) < 0.6
    model = pk.MaskedLinear(pk.PackedWeight.from_dense(weight, mask, format=format))
    x = torch.randn(3, 13)
    before = model(x)
    bits = model.weight.packed_mask().clone()
    model.weight.packed_mask().fill_(255)
    for value in model.state_dict().values():
        if value.dtype == torch.uint8:
            value.fill_(255)
    model.state_dict(keep_vars=True)["weight.mask"].zero_()
    pk.MaskSet.from_model(model).packed("weight").zero_()
    assert torch.equal(model.weight.packed_mask(), bits)
    assert torch.equal(model(x), before)


# --- all of it or nothing ------------------------------------------------------------------------


def dense_net(last: nn.Module) -> tuple[nn.Module, pk.MaskSet]:
    model = nn.Sequential(nn.Linear(30, 40), last)
    shapes = {"0.weight": (40, 30), "1.weight": tuple(last.weight.shape)}
    return model, pk.MaskSet.from_bool({n: torch.rand(s) < 0.3 for n, s in shapes.items()})


def test_a_dense_weight_that_cannot_be_masked_changes_nothing() -> None:
    model, masks = dense_net(nn.Linear(40, 20))
    model[1].weight.data = model[1].weight.data.to(torch.float8_e4m3fn)
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"'1.weight' stays dense .* torch.float8_e4m3fn cannot be"):
        pk.sparsify(model, masks, force=True)
    assert_same(model, before)
    with torch.inference_mode():
        frozen = nn.Conv1d(3, 4, 3)
    model, masks = dense_net(frozen)
    with pytest.raises(ValueError, match=r"'1.weight' was made in torch.inference_mode"):
        pk.sparsify(model, masks, force=True)
    assert type(model[0]) is nn.Linear


def test_memory_for_dense_weights_is_taken_before_the_swap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = nn.Conv1d(6, 4, 3)
    last.weight.data = last.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    model, masks = dense_net(last)
    before = snapshot(model)
    masked = model[1].weight.detach().clone().masked_fill_(~masks["1.weight"], 0)
    contiguous = torch.Tensor.contiguous

    def fails(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) == (4, 6, 3):
            raise torch.OutOfMemoryError("no memory for a copy")
        return contiguous(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", fails)
        with pytest.raises(torch.OutOfMemoryError):
            pk.sparsify(model, masks, force=True)
    assert_same(model, before)
    pk.sparsify(model, masks, force=True)
    assert isinstance(model[0], pk.MaskedLinear)
    assert torch.equal(model[1].weight, masked)
    assert not model[1].weight.is_contiguous()


def test_a_mask_that_fails_after_all_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = dense_net(nn.Conv1d(6, 4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, held = snapshot(model), [id(p) for p in optimizer.param_groups[0]["params"]]
    apply, calls = pk.ops.apply_mask_, []

    def fails(tensor: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        calls.append(tensor.numel())
        if tensor.numel() > 1:
            raise torch.OutOfMemoryError("no memory for a kernel")
        return apply(tensor, packed)

    monkeypatch.setattr(pk.ops, "apply_mask_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        pk.sparsify(model, masks, force=True, optimizer=optimizer)
    assert calls == [1, 72]
    assert_same(model, before)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held


# --- hooks ---------------------------------------------------------------------------------------


def test_hooks_of_state_dicts_go_along() -> None:
    model = nets.net("mlp")
    masks = nets.random_masks(model)
    calls: list[tuple[str, nn.Module]] = []
    first = model.first
    first.register_state_dict_pre_hook(lambda m, *_: calls.append(("pre", m)))
    first.register_state_dict_post_hook(lambda m, *_: calls.append(("post", m)))
    before_load = first.register_load_state_dict_pre_hook(lambda m, *_: calls.append(("load", m)))
    first.register_load_state_dict_post_hook(lambda m, _: calls.append(("loaded", m)))
    del first

    def check(*expected: str) -> None:
        gc.collect()  # the layer that was there before is gone
        calls.clear()
        model.load_state_dict(model.state_dict())
        assert calls == [(name, model.first) for name in expected]

    pk.sparsify(model, masks, force=True)
    check("pre", "post", "load", "loaded")
    # A failure puts the hooks back where they were.
    wrong = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"holds none of the weights"):
        pk.densify(model, optimizer=wrong)
    check("pre", "post", "load", "loaded")
    pk.densify(model)
    check("pre", "post", "load", "loaded")
    before_load.remove()
    check("pre", "post", "loaded")


def test_a_hook_may_bring_the_dense_weight() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    masks = nets.random_masks(model, 0.4)

    def rename(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, *rest: object) -> None:
        if prefix + "kernel" in state:
            state[prefix + "weight"] = state.pop(prefix + "kernel").T

    model[0].register_load_state_dict_pre_hook(rename)
    pk.sparsify(model, masks, force=True)
    kernel = torch.randn(6, 5)
    model.load_state_dict({"0.kernel": kernel, "0.bias": torch.zeros(5)})
    assert torch.equal(model[0].weight.to_dense(), kernel.T * masks["0.weight"])
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"0.other\""):
        model.load_state_dict({**model.state_dict(), "0.other": torch.ones(1)})


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_weight_are_refused(register: str) -> None:
    model = nets.net("mlp")
    masks = nets.random_masks(model)
    handle = getattr(model.last.weight, register)(lambda _: None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"sparsify: 'last.weight' has a hook \({register}\)"):
        pk.sparsify(model, masks, force=True)
    assert_same(model, before)
    handle.remove()
    pk.sparsify(model, masks, force=True)
    getattr(model.last.weight.values, register)(lambda _: None)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"densify: 'last.weight.values' has a hook"):
        pk.densify(model)
    assert_same(model, before)


# --- which layers --------------------------------------------------------------------------------


def test_only_a_conv1d_as_that_of_transformers_is_one() -> None:
    def named(module: str, nf: int | None) -> nn.Module:
        def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight + self.bias

        cls = type("Conv1D", (nn.Module,), {"forward": forward, "__module__": module})
        layer = cls()
        layer.weight, layer.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4))
        if nf is not None:
            layer.nf = nf
        return layer

    assert layers.kind(named("transformers.pytorch_utils", 4)) == "conv1d"
    assert layers.kind(Conv1D(6, 4)) == "conv1d"
    assert layers.kind(named("mine", 4)) == "conv1d"
    assert layers.kind(named("mine", 6)) == ""
    assert layers.kind(named("mine", None)) == ""
    flat = named("mine", 4)
    flat.weight = nn.Parameter(torch.randn(4))
    assert layers.kind(flat) == ""


def test_a_call_of_its_own_stays_dense(caplog: pytest.LogCaptureFixture) -> None:
    class Called(nn.Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    model = nn.Sequential(Called(6, 5))
    masks = nets.random_masks(model)
    with caplog.at_level(logging.WARNING, "paikern"):
        pk.sparsify(model, masks, force=True)
    assert "Called has a forward or __call__ of its own" in caplog.text
    assert model(torch.ones(2, 6)).shape == (2, 5)


def test_densify_of_a_layer_made_by_hand() -> None:
    packed = pk.PackedWeight.from_dense(torch.randn(4, 3), torch.rand(4, 3) < 0.5)
    with pytest.raises(ValueError, match=r"make it with MaskedConv1D.from_conv1d\(layer, weight="):
        pk.densify(nn.Sequential(pk.MaskedConv1D(packed)))
    dense = pk.densify(nn.Sequential(pk.MaskedLinear(packed)))
    assert torch.equal(dense[0].weight, packed.to_dense())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_refused() -> None:
    model = nets.net("mlp")
    masks = nets.random_masks(model)
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"sparsify: Muon needs parameters of two dimensions"):
        pk.sparsify(model, masks, force=True, optimizer=optimizer)
    assert_same(model, before)


# --- inference mode ------------------------------------------------------------------------------


def test_positions_of_inference_mode_serve_training() -> None:
    packed = pk.PackedWeight.from_dense(torch.randn(8, 6), torch.rand(8, 6) < 0.4)
    column = pk.MaskedConv1D(copy.deepcopy(packed))
    layer = pk.MaskedLinear(packed)
    with torch.inference_mode():
        layer.weight.where(transposed=True)
        column(torch.randn(2, 8))
        layer.load_state_dict(layer.state_dict())
    for module, features in ((layer, 6), (column, 8)):
        x = torch.randn(2, features, requires_grad=True)
        (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
        assert x.grad is not None
        held = (module.weight.positions, module.weight.starts, *module.weight._transposed)
        assert not any(tensor.is_inference() for tensor in held)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, -1, 1.5, float("nan"), "32", True], ids=str)
def test_batches(batch: object) -> None:
    model = nets.net("mlp")
    masks = nets.random_masks(model)
    with pytest.raises(ValueError, match=r"^sparsify: batch must be an int of at least 1, got "):
        pk.sparsify(model, masks, batch=batch)
    with pytest.raises(ValueError, match=r"^explain: batch must be an int of at least 1, got "):
        pk.explain(model, batch=batch)


def test_no_model_and_no_masks() -> None:
    model = nets.net("mlp")
    masks = nets.random_masks(model)
    for masks_given, name in ((dict(masks), "dict"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^sparsify: masks must be a MaskSet, got {name}$"):
            pk.sparsify(model, masks_given)
    for operation in (lambda m: pk.sparsify(m, masks), pk.densify, pk.explain):
        with pytest.raises(TypeError, match=r"model must be an nn.Module, got MaskSet$"):
            operation(masks)


def test_packed_with_other_positions_names_the_first() -> None:
    model = nets.net("mlp")
    masks = nets.random_masks(model)
    pk.sparsify(model, masks, force=True)
    others = dict(reversed([*nets.random_masks(model, 0.5, seed=8).items()]))
    with pytest.raises(ValueError, match=r"'first.weight' is packed with other positions"):
        pk.sparsify(model, pk.MaskSet.from_bool(others), force=True)


def test_constructors_of_layers() -> None:
    packed = pk.PackedWeight.from_dense(torch.randn(4, 3), torch.rand(4, 3) < 0.5)
    for cls, size in ((pk.MaskedLinear, 4), (pk.MaskedConv1D, 3)):
        assert cls(packed, torch.zeros(size)).bias is not None
        with pytest.raises(ValueError, match=rf"{cls.__name__}: bias must be \[{size}\] .*\(7,\)"):
            cls(packed, torch.zeros(7))
        with pytest.raises(TypeError, match=f"{cls.__name__}: weight must be a PackedWeight, got"):
            cls(torch.randn(4, 3))
        with pytest.raises(TypeError, match=f"{cls.__name__}: bias must be a tensor or None, got"):
            cls(packed, 3)
    with pytest.raises(TypeError, match=r"MaskedConv2d: weight must be a PackedWeight, got Tensor"):
        pk.MaskedConv2d(nn.Conv2d(2, 2, 3), torch.randn(2, 2, 3, 3))
    with pytest.raises(TypeError, match=r"MaskedConv2d: conv must be an nn.Conv2d, got Linear"):
        pk.MaskedConv2d(nn.Linear(2, 2), packed)


def test_bad_packed_weights(tmp_path: object) -> None:
    weight, mask = torch.ones(2, 3), torch.tensor([[True, False, True], [False, True, False]])
    bits = pk.ops.pack_mask(mask)
    values = torch.tensor([1.0, torch.nan, 2.0])
    with pytest.raises(ValueError, match=r"^PackedWeight: values hold NaN"):
        pk.PackedWeight(values, bits, (2, 3))
    packed = pk.PackedWeight.from_dense(weight, mask)
    packed.values.data = values
    path = f"{tmp_path}/weight.safetensors"
    packed.save(path)  # what training has made of it is kept
    again = pk.PackedWeight.load(path)
    assert again.values.isnan().tolist() == [False, True, False]
    packed.load_state_dict(again.state_dict())
    for panel in (0, 3, 1 << 17, 64.0, "64"):
        with pytest.raises(ValueError, match=r"^PackedWeight: panel must be a power of two"):
            pk.PackedWeight(torch.ones(3), bits, (2, 3), panel=panel)
        with pytest.raises(ValueError, match=r"^PackedWeight.from_dense: panel must be a power of"):
            pk.PackedWeight.from_dense(weight, mask, panel=panel)
    message = "^PackedWeight.from_dense: {} must be a dense torch.Tensor, got {}$"
    for bad, name in (([[1.0]], "list"), (weight.to_sparse(), "one of torch.sparse_coo")):
        with pytest.raises(TypeError, match=message.format("weight", name)):
            pk.PackedWeight.from_dense(bad, mask)
        with pytest.raises(TypeError, match=message.format("mask", name)):
            pk.PackedWeight.from_dense(weight, bad)
    with pytest.raises(
        TypeError, match=r"^PackedWeight: values must be a dense torch.Tensor, got "
    ):
        pk.PackedWeight([1.0], bits, (2, 3))


def test_sizes_of_a_packed_weight() -> None:
    packed = pk.PackedWeight.from_dense(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4) > 0)
    assert (packed.size(), packed.dim(), packed.numel()) == ((2, 3, 1, 4), 4, 24)
