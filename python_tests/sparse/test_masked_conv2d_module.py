"""MaskedConv2d against nn.Conv2d with the same zeros, alone and in a net that is trained."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import paikern as pk
from paikern import ops
from paikern.backends.masked_conv_cost import estimate_conv
from python_tests.ops.masked_linear_cases import within
from python_tests.sparse import nets

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# in, out, kernel, the other arguments
CASES: dict[str, tuple[int, int, Any, dict[str, Any]]] = {
    "1x1": (6, 8, 1, {}),
    "1x1-stride": (6, 8, 1, {"stride": 2, "bias": False}),
    "3x3": (4, 6, 3, {"padding": 1}),
    "7x7-stem": (3, 5, 7, {"stride": 2, "padding": 3, "bias": False}),
    "oblong": (4, 6, (1, 5), {"padding": (0, 2), "stride": (2, 1)}),
    "dilated": (4, 6, 3, {"dilation": 2, "padding": 2}),
    "grouped": (6, 9, 3, {"groups": 3, "padding": 1}),
    "depthwise": (6, 6, 3, {"groups": 6, "padding": 1}),
    "same": (4, 6, 3, {"padding": "same"}),
    "same-even": (4, 6, (2, 4), {"padding": "same", "dilation": (1, 2)}),
    "valid": (4, 6, 3, {"padding": "valid"}),
    "reflect": (4, 6, 3, {"padding": 1, "padding_mode": "reflect"}),
    "circular-same": (4, 6, 4, {"padding": "same", "padding_mode": "circular"}),
    "replicate": (4, 6, 3, {"padding": (2, 1), "padding_mode": "replicate"}),
    "patches": (3, 16, 4, {"stride": 4}),
}


def pair(name: str, density: float = 0.3) -> tuple[pk.MaskedConv2d, nn.Conv2d, torch.Tensor]:
    torch.manual_seed(0)
    inputs, outputs, kernel, more = CASES[name]
    dense = nn.Conv2d(inputs, outputs, kernel, **more)
    mask = torch.rand(dense.weight.shape) < density
    packed = pk.MaskedConv2d.from_conv(dense, mask)
    with torch.no_grad():
        dense.weight.mul_(mask)
    return packed, dense, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_convolution(name: str, dtype: torch.dtype) -> None:
    packed, dense, mask = pair(name)
    assert f"padding={dense.padding}" in repr(packed) or "padding" not in repr(dense)
    truth = copy.deepcopy(dense).double()
    packed, dense = packed.to(dtype), dense.to(dtype)
    for shape in [(2, dense.in_channels, 12, 13), (dense.in_channels, 9, 8)]:
        x = torch.randn(shape).to(dtype)
        leaves = [t.clone().requires_grad_() for t in (x, x, x.double())]
        outs = [m(leaf) for m, leaf in zip((packed, dense, truth), leaves, strict=True)]
        within(outs[0].detach(), outs[1].detach(), outs[2].detach())
        g = torch.randn(outs[0].shape).to(dtype)
        for module, out in zip((packed, dense, truth), outs, strict=True):
            module.zero_grad()
            out.backward(g.to(out.dtype))
        within(leaves[0].grad, leaves[1].grad, leaves[2].grad)
        found = packed.weight.values.grad
        within(found, dense.weight.grad[mask], truth.weight.grad[mask])
        if packed.bias is not None:
            within(packed.bias.grad, dense.bias.grad, truth.bias.grad)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything_kept(density: float) -> None:
    packed, dense, _ = pair("3x3", density)
    x = torch.randn(2, 4, 5, 6)
    assert torch.allclose(packed(x), dense(x), atol=1e-5)
    assert packed(x[:0]).shape == (0, 6, 5, 6)


def test_attributes_and_state_dicts() -> None:
    packed, dense, mask = pair("grouped")
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "padding_mode",
        "dilation", "groups",
    ):  # fmt: skip
        assert getattr(packed, name) == getattr(dense, name)
    assert packed.weight.shape == dense.weight.shape == (9, 2, 3, 3)
    assert (packed.weight.rows, packed.weight.columns) == (9, 18)
    assert f"nnz={int(mask.sum())} of 162" in repr(packed)
    state = packed.state_dict()
    assert torch.equal(state["weight.mask"], ops.pack_mask(mask))
    assert torch.equal(state["weight.values"], dense.weight[mask])
    with pk.dense_keys():
        assert torch.equal(packed.state_dict()["weight"], dense.weight)
    full = torch.randn(9, 2, 3, 3)
    packed.load_state_dict({"weight": full, "bias": dense.bias})
    assert torch.equal(packed.weight.to_dense(), full * mask)
    back = packed.to_dense()
    assert type(back) is nn.Conv2d
    assert repr(back) == repr(dense)
    assert back.bias is packed.bias
    x = torch.randn(1, 6, 5, 5)
    assert torch.allclose(back(x), packed(x), atol=1e-5)


def test_errors_name_what_came() -> None:
    packed, *_ = pair("3x3")
    with pytest.raises(ValueError, match=r"masked_conv2d: .*\(2, 5, 8, 8\)"):
        packed(torch.ones(2, 5, 8, 8))
    with pytest.raises(TypeError, match=r"masked_conv2d: x is torch\.float64"):
        packed(torch.ones(2, 4, 8, 8, dtype=torch.float64))
    weight = pk.PackedWeight.from_dense(torch.ones(6, 36), torch.ones(6, 36).bool())
    with pytest.raises(ValueError, match=r"needs a weight of shape \(6, 4, 3, 3\), got \(6, 36\)"):
        pk.MaskedConv2d.from_conv(nn.Conv2d(4, 6, 3), weight=weight)
    with pytest.raises(ValueError, match="Conv2d: give a mask, or the weight packed already"):
        pk.MaskedConv2d.from_conv(nn.Conv2d(4, 6, 3))


def test_autocast_and_meta() -> None:
    packed, dense, _ = pair("same-even")
    x = torch.randn(2, 4, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), dense(x), atol=0.05, rtol=0.05)
    assert copy.deepcopy(packed).to("meta")(x.to("meta")).shape == found.shape


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False)
        self.point = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = self.point(functional.relu(self.wide(x)))
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_small_net_trains_as_the_dense_one(kind: str) -> None:
    dense = conv_net()
    masks = nets.random_masks(dense, 0.4)
    packed = pk.sparsify(copy.deepcopy(dense), masks, force=True)
    assert sum(isinstance(module, pk.MaskedConv2d) for module in packed.modules()) == 3

    def train(model: nn.Module, attach: bool) -> list[float]:
        make = {
            "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
            "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
        }[kind]
        optimizer = make(model.parameters())
        if attach:
            masks.attach(model, optimizer)
        generator, losses = torch.Generator().manual_seed(1), []
        for _ in range(50):
            x = torch.randn(8, 2, 9, 9, generator=generator)
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), (4 * x.mean((1, 2, 3))).long() % 4)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train(packed, False) == pytest.approx(train(dense, True), rel=2e-3, abs=1e-4)
    nets.assert_close(nets.dense_state(packed), dense.state_dict(), 2e-3)
    masks.verify(packed)


def test_there_and_back_with_the_optimizer() -> None:
    model = conv_net()
    masks = nets.random_masks(model, 0.4)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(2, 2, 9, 9)
    model(x).square().sum().backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    masks.apply(twin)
    moments = optimizer.state[model.wide.weight]["exp_avg"].clone()
    pk.sparsify(model, masks, force=True, optimizer=optimizer)
    values = model.wide.weight.values
    assert torch.equal(optimizer.state[values]["exp_avg"], moments[masks["wide.weight"]])
    assert pk.MaskSet.from_model(model) == masks
    assert torch.allclose(model.eval()(x), twin.eval()(x), atol=1e-5)
    model(x).square().sum().backward()
    optimizer.step()
    twin.load_state_dict(nets.dense_state(model))
    pk.densify(model, optimizer=optimizer)
    nets.assert_equal(model.state_dict(), twin.state_dict())
    assert optimizer.state[model.wide.weight]["exp_avg"].shape == moments.shape


def test_maps_decide() -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(128, 128, 3, padding="same"), nn.Conv2d(128, 8, 1, stride=4))

    masks = nets.random_masks(net(), 0.02)
    kept = list(masks.kept_by_layer.values())
    for training in (False, True):
        model, x = net(), torch.randn(4, 128, 14, 14)
        found = [
            estimate_conv("cpu", 128, 128, (3, 3), (16, 16), kept[0], 4, training=training),
            estimate_conv(
                "cpu", 8, 128, (1, 1), (14, 14), kept[1], 4, stride=(4, 4), training=training
            ),
        ]
        pk.sparsify(model, masks, example_inputs=x, training=training)
        packed = [isinstance(layer, pk.MaskedConv2d) for layer in model]
        assert packed == [estimate.kernel == "direct" for estimate in found]
        rows = pk.explain(model, example_inputs=x, training=training).layers
        assert [row.why for row in rows if row.packed] == [
            estimate.why for estimate in found if estimate.kernel == "direct"
        ]
        assert [row.dense_seconds for row in rows] == [e.dense_seconds for e in found]
    without = pk.sparsify(net(), masks, batch=4)
    assert not any(isinstance(layer, pk.MaskedConv2d) for layer in without)
    forced = pk.explain(pk.sparsify(net(), masks, force=True))
    assert {(row.packed, row.forward, row.seconds) for row in forced.layers} == {
        (True, "unknown", None)
    }
    assert "give example_inputs" in forced.layers[0].why


def test_compiled_without_graph_breaks() -> None:
    model = pk.sparsify(conv_net(), nets.random_masks(conv_net(), 0.4), force=True)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 2, 9, 9)
    for network in (model, compiled):
        network(x).square().sum().backward()
    grads = [[p.grad for p in network.parameters()] for network in (model, twin)]
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_subclasses_with_a_way_of_their_own_stay_dense() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):  # type: ignore[no-untyped-def]
            return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)

    model = nn.Sequential(Standardised(2, 3, 3), nn.ConvTranspose2d(3, 2, 3))
    pk.sparsify(model, nets.random_masks(model), force=True)
    whys = [row.why for row in pk.explain(model).layers]
    assert whys == [
        "Standardised.weight has no packed form: Standardised has a forward or __call__ of its own",
        "ConvTranspose2d.weight has no packed form",
    ]
