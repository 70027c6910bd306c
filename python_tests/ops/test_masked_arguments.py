"""What the operations on packed weights refuse, and that none of them reads what is not there."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import paikern as pk
from paikern import ops
from paikern.backends import registry
from paikern.zoo.gpt2 import Conv1D
from python_tests.ops.masked_linear_cases import make

BACKENDS = ["cpu", "reference"]
FORMATS = ["index", "bitmap"]
WINDOW: dict[str, Any] = {"kernel": 3}


def conv_weight(format: str = "index") -> pk.PackedWeight:
    weight = torch.randn(8, 4, 3, 3)
    return pk.PackedWeight.from_dense(weight, torch.rand(8, 4, 3, 3) < 0.5, format=format)


def layers(format: str) -> list[tuple[nn.Module, Tensor]]:
    dense = Conv1D(30, 40)
    conv = nn.Conv2d(4, 8, 3)
    linear = make(40, 30, 0.4, format=format)
    conv1d = make(30, 40, 0.4, format=format)
    return [
        (pk.MaskedLinear(linear.packed, linear.bias), torch.randn(4, 30)),
        (
            pk.MaskedConv1D.from_conv1d(dense, weight=conv1d.packed),
            torch.randn(4, 30),
        ),
        (pk.MaskedConv2d(conv, conv_weight(format)), torch.randn(2, 4, 6, 6)),
    ]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("warm", [False, True], ids=["first", "warm"])
def test_values_of_another_length_are_refused(format: str, which: int, warm: bool) -> None:
    for wrong in ((3,), (0,), "one more", "two columns"):
        layer, x = layers(format)[which]
        kept = layer.weight.values.numel()  # type: ignore[union-attr, operator]
        if warm:
            layer(x)
        shape: Any = {"one more": (kept + 1,), "two columns": (kept, 2)}.get(str(wrong), wrong)
        with pytest.raises(ValueError, match=rf"values must be \[{kept}\] for this weight"):
            torch.func.functional_call(layer, {"weight.values": torch.zeros(shape)}, x)
        layer.weight.values = nn.Parameter(torch.randn(shape))  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=rf"values must be \[{kept}\]"):
            layer(x)


def test_values_of_another_length_are_refused_by_compiled_layers() -> None:
    layer, x = layers("index")[0]
    compiled = torch.compile(layer, backend="eager")
    compiled(x)
    layer.weight.values = nn.Parameter(torch.randn(3))  # type: ignore[union-attr]
    with pytest.raises(Exception, match=r"values must be \["):
        compiled(x)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True])
def test_raw_linear_operations_read_what_is_there(
    format: str, backend: str, transposed: bool
) -> None:
    raw = torch.ops.paikern
    packed = make(40, 30, 0.4, format=format).packed
    where, values = packed.where(transposed=transposed), packed.values.detach()
    x, g = torch.randn(4, 30), torch.randn(4, 40)
    starts, kept = where[1], where[8]
    fewer = (*where[:8], kept - 1)
    with registry.using(backend):
        for wrong in (torch.randn(2, 3), torch.randn(3), torch.tensor(1.0)):
            with pytest.raises(ValueError, match=r"x must be \[..., 30\]"):
                raw.masked_linear(wrong, values, None, *where)
            with pytest.raises(ValueError, match=r"g must be \[..., 40\]"):
                raw.masked_linear_input(wrong, values, *where)
            with pytest.raises(ValueError, match=r"g must be \[..., 40\]"):
                raw.masked_linear_kept(wrong, x, *where)
            with pytest.raises(ValueError, match=r"x must be \[..., 30\]"):
                raw.masked_linear_kept(g, wrong, *where)
        with pytest.raises(ValueError, match="g and x must hold as many rows"):
            raw.masked_linear_kept(g, x[:2], *where)
        with pytest.raises(ValueError, match=r"bias must be \[40\] .* got \(3,\)"):
            raw.masked_linear(x, values, torch.randn(3), *where)
        with pytest.raises(ValueError, match=rf"values must be \[{kept}\] .* got \(3,\)"):
            raw.masked_linear(x, values[:3], None, *where)
        with pytest.raises(ValueError, match=rf"values must be \[{kept}\] .* got \(3,\)"):
            raw.masked_linear_input(g, values[:3], *where)
        for name, *given in (
            ("masked_linear", x, values[:-1], None),
            ("masked_linear_input", g, values[:-1]),
            ("masked_linear_kept", g, x),
        ):
            with pytest.raises(ValueError, match=f"{name}: (values|positions) must be"):
                getattr(raw, name)(*given, *fewer)
        with pytest.raises(ValueError, match=r"starts int32 \[41\], got .* \[5\]"):
            raw.masked_linear(x, values, None, where[0], starts[:5], *where[2:])
        with pytest.raises(ValueError, match="panel a power of two up to 65536, got 40, 30 and 3"):
            raw.masked_linear(x, values, None, *where[:7], 3, kept)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_moves_of_values_read_what_is_there(format: str, backend: str) -> None:
    raw = torch.ops.paikern
    packed = make(40, 30, 0.4, format=format).packed
    places, values = packed._places(), packed.values.detach()
    fewer = (*places[:5], packed.nnz - 1)
    with registry.using(backend):
        with pytest.raises(ValueError, match=r"scatter_kept: values must be .* got \(3,\)"):
            raw.scatter_kept(values[:3], *places)
        with pytest.raises(ValueError, match=r"scatter_kept: (values|positions) must be"):
            raw.scatter_kept(values[:-1], *fewer)
        with pytest.raises(ValueError, match=r"gather_kept: (values|positions) must be"):
            raw.gather_kept(torch.randn(40, 30), *fewer)
        with pytest.raises(ValueError, match=r"gather_kept: dense must be \[40, 30\]"):
            raw.gather_kept(torch.randn(4, 30), *places)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_raw_convolutions_read_what_is_there(format: str, backend: str) -> None:
    raw = torch.ops.paikern
    packed = conv_weight(format)
    where, values = packed.where(transposed=True), packed.values.detach()
    conv = ([3, 3], [1, 1], [0, 0], [1, 1], 1)
    x, g = torch.randn(2, 4, 6, 6), torch.randn(2, 8, 4, 4)
    with registry.using(backend):
        assert raw.masked_conv2d(x, values, None, *where, *conv).shape == g.shape
        for wrong in (x[:, :3], x[0], torch.randn(2, 4, 2, 6)):
            with pytest.raises(ValueError, match="masked_conv2d: "):
                raw.masked_conv2d(wrong, values, None, *where, *conv)
            with pytest.raises(ValueError, match="masked_conv2d_input: g must be"):
                raw.masked_conv2d_input(wrong, values, *where, *conv, [6, 6])
            with pytest.raises(ValueError, match="masked_conv2d_kept: "):
                raw.masked_conv2d_kept(g, wrong, *where, *conv)
            with pytest.raises(ValueError, match="masked_conv2d_kept: g must be"):
                raw.masked_conv2d_kept(wrong, x, *where, *conv)
        with pytest.raises(ValueError, match=r"values must be \["):
            raw.masked_conv2d(x, values[:3], None, *where, *conv)
        with pytest.raises(ValueError, match=r"values must be \["):
            raw.masked_conv2d_input(g, values[:3], *where, *conv, [6, 6])
        with pytest.raises(ValueError, match=r"bias must be \[8\]"):
            raw.masked_conv2d(x, values, torch.randn(3), *where, *conv)
        with pytest.raises(ValueError, match="groups must divide the 8 rows"):
            raw.masked_conv2d(x, values, None, *where, *conv[:4], 3)
        with pytest.raises(ValueError, match="kernel must be 2 integers >= 1"):
            raw.masked_conv2d(x, values, None, *where, [0, 3], *conv[1:])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("recorded", [False, True], ids=["no_grad", "grad"])
def test_a_traced_model_equals_the_eager_one(format: str, recorded: bool) -> None:
    for layer, x in layers(format):
        with torch.set_grad_enabled(recorded), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            eager = layer(x)
            traced = torch.jit.trace(layer, x)
            assert "paikern::masked" in str(traced.inlined_graph)
            other = torch.randn_like(x)
            assert torch.equal(traced(x), eager)
            assert torch.equal(traced(other), layer(other))


def test_a_kernel_that_is_not_that_of_the_weight_is_refused() -> None:
    x, packed = torch.randn(1, 4, 9, 9), conv_weight()
    for kernel in ((1, 9), (9, 1), 1, (3, 1)):
        with pytest.raises(ValueError, match=r"kernel must be \(3, 3\) for a weight of shape"):
            ops.masked_conv2d(x, packed, kernel=kernel)
    with pytest.raises(ValueError, match=r"masked_linear: weight must be \[out, in\], got \(8, 4"):
        ops.masked_linear(torch.randn(3, 36), packed)
    odd = pk.PackedWeight.from_dense(torch.ones(8, 4, 3), torch.ones(8, 4, 3) > 0)
    with pytest.raises(ValueError, match=r"weight must be \[out, in / groups, kh, kw\] or"):
        ops.masked_conv2d(x, odd, kernel=(1, 3))


def both(x: Any, bias: Any, match: str) -> None:
    """The same for the two operations, and for a `Conv1D` where it is about x."""
    with pytest.raises(TypeError, match=match):
        ops.masked_linear(x, make(5, 7, 0.5).packed, bias)
    with pytest.raises(TypeError, match=match):
        ops.masked_conv2d(x, conv_weight(), bias, **WINDOW)
    if bias is None:
        with pytest.raises(TypeError, match=match):
            pk.MaskedConv1D(make(5, 7, 0.5).packed)(x)


def test_what_is_no_dense_tensor_is_refused() -> None:
    for x, kind in ((None, "NoneType"), ([1.0], "list"), (np.ones((3, 7)), "ndarray")):
        both(x, None, f"x must be a torch.Tensor, got {kind}; make it one")
    both(torch.ones(3, 7), 1.0, "bias must be a torch.Tensor or None, got float")
    for sparse in (torch.ones(3, 7).to_sparse(), torch.ones(3, 7).to_sparse_csr()):
        both(sparse, None, r"x must be a dense tensor, got one of torch.sparse_\w+; pass x.to_d")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for layer, x in layers("index"):
        layer.weight.values = nn.Parameter(layer.weight.values.detach().to(dtype))  # type: ignore
        layer.bias = None
        with pytest.raises(TypeError, match=rf"weight must be float32, .* got {dtype}; convert"):
            layer(x.to(dtype))
    packed = make(5, 7, 0.5).packed
    with registry.using("cpu"), pytest.raises(TypeError, match=f"got {dtype}"):
        torch.ops.paikern.masked_linear(
            torch.ones(1, 7),
            packed.values.detach().to(dtype),
            None,
            *packed.where(transposed=False),
        )


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"kernel": 3.0}, "kernel must be one integer or two, got 3.0"),
        ({"kernel": None}, "kernel must be one integer or two, got None"),
        ({"kernel": "33"}, "kernel must be one integer or two, got '33'"),
        ({"stride": 1.5}, "stride must be one integer or two, got 1.5"),
        ({"stride": (1, 1.5)}, r"stride must be one integer or two, got \(1, 1.5\)"),
        ({"groups": 1.0}, "groups must be one integer, got 1.0"),
        ({"padding": "same"}, r'got \'same\'; "valid" is 0, "same" is dilation \* \(kernel - 1'),
    ],
    ids=str,
)
def test_numbers_that_are_no_integers_are_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        ops.masked_conv2d(torch.randn(1, 4, 6, 6), conv_weight(), **{**WINDOW, **given})


def test_symbolic_tracing_says_what_to_use_instead() -> None:
    for layer, _ in layers("index"):
        model = nn.Sequential(layer)
        with pytest.raises(TypeError, match=r"is a torch.fx.Proxy, .*; use torch.export, or a"):
            fx.symbolic_trace(model)
