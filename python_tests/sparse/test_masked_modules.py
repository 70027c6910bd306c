"""MaskedLinear and MaskedConv1D: values, gradients, state dicts, moves, what users read."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import paikern as pk
from paikern import ops
from paikern.zoo.gpt2 import Conv1D
from python_tests.ops.masked_linear_cases import DTYPES, within

KINDS = ("linear", "conv1d")


def ids(value: object) -> str:
    return str(value).replace("torch.", "")


def dense_layer(kind: str, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    if kind == "linear":
        return nn.Linear(inputs, outputs, bias=bias)
    layer = Conv1D(inputs, outputs)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    if not bias:
        layer.register_parameter("bias", None)
    return layer


def pair(
    kind: str, inputs: int = 9, outputs: int = 6, density: float = 0.4, bias: bool = True
) -> tuple[pk.MaskedLinear | pk.MaskedConv1D, nn.Module, torch.Tensor]:
    """A packed layer, the dense one with zeros, the mask."""
    layer = dense_layer(kind, inputs, outputs, bias)
    mask = torch.rand(layer.weight.shape) < density
    pack = pk.MaskedLinear.from_linear if kind == "linear" else pk.MaskedConv1D.from_conv1d
    packed = pack(layer, mask)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(mask)
    return packed, twin, mask


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 70),
    st.integers(0, 70),
    st.sampled_from([(), (0,), (1,), (17,), (2, 3), (0, 3)]),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_forward_and_backward_follow_the_dense_layer(
    kind: str,
    inputs: int,
    outputs: int,
    batch: tuple[int, ...],
    density: float,
    dtype: torch.dtype,
    bias: bool,
) -> None:
    if kind == "conv1d" and not bias:
        bias = True  # the dense class always has one
    if inputs == 0:
        inputs = 1  # torch warns about initialising nothing
    packed, twin, mask = pair(kind, inputs, max(outputs, 1), density, bias)
    packed, twin = packed.to(dtype), twin.to(dtype)
    truth = copy.deepcopy(twin).double()
    x = torch.randn(*batch, inputs).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, x, x.double())]
    outs = [m(leaf) for m, leaf in zip((packed, twin, truth), leaves, strict=True)]
    within(outs[0].detach(), outs[1].detach(), outs[2].detach())
    g = torch.randn(outs[0].shape).to(dtype)
    for out in outs:
        out.backward(g.to(out.dtype))
    within(leaves[0].grad, leaves[1].grad, leaves[2].grad)
    within(packed.weight.values.grad, twin.weight.grad[mask], truth.weight.grad[mask])
    if bias:
        within(packed.bias.grad, twin.bias.grad, truth.bias.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind: str) -> None:
    packed, *_ = pair(kind, 4, 3, 0.6)
    packed = packed.double()

    def run(x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(packed, {"weight.values": values, "bias": bias}, (x,))

    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, packed.weight.values, packed.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_what_users_read(kind: str) -> None:
    packed, twin, mask = pair(kind)
    assert packed.weight.shape == twin.weight.shape
    assert packed.weight.dtype == torch.float32
    assert packed.weight.device.type == "cpu"
    assert packed.bias.shape == (6,)
    nnz = int(mask.sum())
    assert packed.weight.nnz == nnz
    sizes = "in_features=9, out_features=6" if kind == "linear" else "nx=9, nf=6"
    assert sizes in repr(packed)
    assert f"nnz={nnz} of 54" in repr(packed)
    assert f"{packed.weight.nbytes:,} bytes" in repr(packed)
    assert "bias=False" in repr(pair(kind, bias=False)[0])
    if kind == "linear":
        assert (packed.in_features, packed.out_features) == (9, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inside", [False, True])
def test_state_dicts(kind: str, inside: bool) -> None:
    packed, twin, mask = pair(kind)
    _other, *_ = pair(kind)
    models = [nn.Sequential(m) if inside else m for m in (packed, twin)]
    model, dense = models
    prefix = "0." if inside else ""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(state) == {prefix + name for name in ("weight.values", "weight.mask", "bias")}
    assert torch.equal(state[prefix + "weight.mask"], ops.pack_mask(mask))
    with pk.dense_keys():
        as_dense = model.state_dict()
    assert {k: v.tolist() for k, v in as_dense.items()} == {
        k: v.tolist() for k, v in dense.state_dict().items()
    }
    # Any dense checkpoint can be loaded: what it has under the mask is dropped.
    full = {name: torch.randn(v.shape) for name, v in dense.state_dict().items()}
    given = dict(full)
    assert str(model.load_state_dict(given)) == "<All keys matched successfully>"
    assert set(given) == set(full)
    assert torch.equal(packed.weight.to_dense(), full[prefix + "weight"] * mask)
    assert torch.equal(packed.bias, full[prefix + "bias"])
    model.load_state_dict(state)
    assert torch.equal(packed.weight.to_dense(), twin.weight)
    # A checkpoint with another mask of as many weights brings its positions.
    moved = torch.zeros(54, dtype=torch.bool)
    moved[: packed.weight.nnz] = True
    bits = ops.pack_mask(moved)
    model.load_state_dict({**state, prefix + "weight.mask": bits})
    assert torch.equal(packed.weight.packed_mask(), bits)
    x = torch.randn(2, 9)
    shape = packed.weight.shape
    assert torch.equal(packed.weight.to_dense() != 0, moved.reshape(shape))
    matrix = packed.weight.to_dense()
    expected = x @ (matrix.T if kind == "linear" else matrix) + packed.bias
    assert torch.allclose(packed(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_that_do_not_fit(kind: str) -> None:
    packed, twin, _ = pair(kind)
    before = packed.weight.to_dense()
    with pytest.raises(RuntimeError, match=r"weight: \(3, 3\) in the state dict, .* here"):
        packed.load_state_dict({"weight": torch.ones(3, 3), "bias": twin.bias})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        packed.load_state_dict({"bias": twin.bias})
    assert not packed.load_state_dict({"bias": twin.bias}, strict=False).unexpected_keys
    assert torch.equal(packed.weight.to_dense(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_assign_and_the_meta_device(kind: str) -> None:
    packed, twin, mask = pair(kind)
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    x = torch.randn(2, 9)
    expected = packed(x)
    bare = copy.deepcopy(packed).to("meta")
    assert bare.weight.values.is_meta
    assert bare.weight.packed_mask().shape == (7,)
    assert bare(x.to("meta")).shape == (2, 6)
    assert "on the meta device" in repr(bare)
    lost = copy.deepcopy(bare).to_empty(device="cpu")
    with pytest.raises(ValueError, match="positions, without content, on the meta device; load"):
        lost(x)
    lost.load_state_dict(state)
    assert torch.equal(lost(x), expected)
    bare.load_state_dict(state, assign=True)
    assert torch.equal(bare(x), expected)
    assert bare.weight.values.requires_grad
    kept = copy.deepcopy(packed).to_empty(device="cpu")  # new memory on the same device
    kept.load_state_dict(twin.state_dict())
    assert torch.equal(kept(x), expected)
    assert mask.any()


@pytest.mark.parametrize("kind", KINDS)
def test_moves_touch_the_values_alone(kind: str) -> None:
    packed, twin, _ = pair(kind)
    positions = packed.weight.positions
    for move in ("half", "bfloat16", "double", "float"):
        getattr(packed, move)()
        assert packed.weight.positions is positions
        assert packed.weight.values.dtype == packed.bias.dtype == getattr(torch, move)
    packed.type(torch.float64)
    assert packed.weight.positions.dtype == torch.int16
    packed.share_memory()
    twin.to(torch.bfloat16).to(torch.float32)
    assert not list(packed.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind: str) -> None:
    packed, *_ = pair(kind)
    x = torch.randn(3, 9, requires_grad=True)
    expected = packed(x)
    expected.sum().backward()  # the transposed positions exist
    copies = [copy.deepcopy(packed), copy.copy(packed), pickle.loads(pickle.dumps(packed))]
    for other in copies:
        assert torch.equal(other(x), expected)
        assert other.weight.nbytes == packed.weight.nbytes
    assert copies[0].weight.positions is not packed.weight.positions


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    packed, twin, _ = pair(kind)
    x = torch.randn(3, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed(x)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), twin(x), atol=0.05, rtol=0.05)
    found.sum().backward()
    assert packed.weight.values.grad.dtype == torch.float32


def test_errors_name_what_came() -> None:
    linear, conv1d = pair("linear")[0], pair("conv1d")[0]
    for layer, name in ((linear, "masked_linear"), (conv1d, "MaskedConv1D")):
        with pytest.raises(ValueError, match=rf"{name}: x must be \[\.\.\., 9\].* got \(2, 8\)"):
            layer(torch.ones(2, 8))
        with pytest.raises(TypeError, match=f"{name}: x is torch.float64 and the weight"):
            layer(torch.ones(2, 9, dtype=torch.float64))
        with pytest.raises(ValueError, match=f"{name}: x is on meta and the weight on cpu"):
            layer(torch.ones(2, 9, device="meta"))
    weight = pk.PackedWeight.from_dense(torch.ones(2, 3, 1, 1), torch.ones(2, 3, 1, 1).bool())
    for cls in (pk.MaskedLinear, pk.MaskedConv1D):
        with pytest.raises(ValueError, match=rf"{cls.__name__}: weight must be .* \(2, 3, 1, 1\)"):
            cls(weight)
    with pytest.raises(ValueError, match="Linear: give a mask, or the weight packed already"):
        pk.MaskedLinear.from_linear(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"mask must have the shape \(2, 2\)"):
        pk.MaskedLinear.from_linear(nn.Linear(2, 2), torch.ones(3, 2).bool())
