from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import paikern as pk
from paikern import ops
from paikern.backends import cpu_masked_conv, registry
from python_tests.ops.masked_conv_cases import Case, check, make
from python_tests.ops.masked_linear_cases import DENSITIES, DTYPES, EXCESS, error
from python_tests.ops.test_masked_linear import ROOT, ids, same_for_any_team

LAYERS: dict[str, tuple[int, int, tuple[int, int], dict[str, Any]]] = {
    "3x3": (20, 16, (3, 3), {"padding": 1}),
    "3x3-stride2": (17, 9, (3, 3), {"padding": 1, "stride": 2}),
    "1x1": (33, 31, (1, 1), {}),
    "1x1-stride2": (8, 12, (1, 1), {"stride": 2}),
    "7x7-stride2": (10, 3, (7, 7), {"stride": 2, "padding": 3}),
    "5x1": (6, 5, (5, 1), {"padding": (2, 0)}),
    "dilated": (7, 6, (3, 2), {"dilation": (2, 3), "padding": (0, 4), "stride": (1, 2)}),
    "groups": (12, 8, (3, 3), {"padding": 1, "groups": 4}),
    "depthwise": (24, 12, (3, 3), {"padding": 2, "groups": 12, "stride": (2, 1)}),
    "padding alone": (3, 2, (1, 1), {"padding": (0, 1), "stride": (1, 40)}),
    "no padding": (5, 4, (4, 3), {}),
}


@pytest.fixture(params=["direct", "dense"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_masked_conv, "conv_kernel", lambda *_: request.param)
    return request.param


def layer(name: str, density: float, *args: Any, **more: Any) -> Case:
    rows, channels, window, conv = LAYERS[name]
    return make(rows, channels, window, density, *args, **more, **conv)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("density", DENSITIES)
def test_masked_conv2d_equals_the_definition(name: str, density: float, kernel: str) -> None:
    case = layer(name, density)
    channels = LAYERS[name][1]
    for batch, size in ((1, (9, 8)), (2, (14, 14)), (5, (7, 31)), (16, (7, 7)), (19, (10, 5))):
        check(case, torch.randn(batch, channels, *size), bias=batch % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("name", ["3x3", "3x3-stride2", "groups"])
def test_masked_conv2d_in_every_dtype_and_format(
    dtype: torch.dtype, format: str, name: str, kernel: str
) -> None:
    case = layer(name, 0.3, dtype, format=format)
    for batch in (1, 3, 17):
        check(case, torch.randn(batch, LAYERS[name][1], 11, 9).to(dtype))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 20),
    channels=st.integers(1, 12),
    groups=st.sampled_from([1, 1, 2, 3]),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(0, 35),
    density=st.floats(0, 1),
    panel=st.sampled_from([1, 16, 4096]),
)
def test_masked_conv2d_of_random_shapes(
    rows: int,
    channels: int,
    groups: int,
    window: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
    batch: int,
    density: float,
    panel: int,
) -> None:
    for n, k, p, d in zip(size, window, padding, dilation, strict=True):
        assume(n + 2 * p >= d * (k - 1) + 1)
    conv = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    case = make(rows * groups, channels * groups, window, density, panel=panel, **conv)
    x = torch.randn(batch, channels * groups, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_masked_conv, "conv_kernel", lambda *_: "direct")
        check(case, x, bias=rows % 2 == 0)


def test_masked_conv2d_by_hand(kernel: str) -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, -1.0, 0.0, 0.0]])  # two 2 x 2 kernels
    packed = pk.PackedWeight.from_dense(weight, weight != 0)
    x = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]], requires_grad=True)
    bias = torch.tensor([10.0, 20.0], requires_grad=True)
    y = ops.masked_conv2d(x, packed, bias, kernel=2)
    assert y.tolist() == [[[[19.0, 22.0]], [[18.0, 17.0]]]]
    y.backward(torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]))
    assert x.grad is not None
    assert bias.grad is not None
    assert packed.values.grad is not None
    assert x.grad.tolist() == [[[[1.0, -1.0, -4.0], [2.0, 4.0, 0.0]]]]
    assert packed.values.grad.tolist() == [5.0, 14.0, 18.0]
    assert bias.grad.tolist() == [3.0, 7.0]


@pytest.mark.parametrize("channels", [7281, 7282, 9000])
def test_masked_conv2d_with_more_columns_than_16_bits(channels: int) -> None:
    for panel in (4096, 65_536):
        case = make(4, channels, (3, 3), 0.001, panel=panel, padding=1)
        check(case, torch.randn(2, channels, 3, 4))


def test_masked_conv2d_takes_any_layout_of_x(kernel: str) -> None:
    case = layer("3x3", 0.2)
    x = torch.randn(3, 16, 9, 10)
    check(case, x.to(memory_format=torch.channels_last))
    check(case, torch.randn(3, 32, 9, 20)[:, ::2, :, 1::2])
    check(case, torch.randn(1, 16, 9, 10).expand(3, 16, 9, 10))
    check(case, x.transpose(2, 3))
    last = case.run(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert case.run(x).is_contiguous()
    assert torch.equal(case.run(x[0]), case.run(x)[0]) or kernel == "dense"
    torch.testing.assert_close(case.run(x[0]), case.run(x)[0])


@pytest.mark.parametrize("density", DENSITIES)
def test_masked_conv2d_of_one_tap_is_a_linear_layer_over_channels_last_maps(density: float) -> None:
    case = layer("1x1", density)
    for batch, size in ((1, (3, 4)), (2, (9, 9)), (17, (6, 5))):
        maps = torch.randn(batch, 31, *size).to(memory_format=torch.channels_last)
        check(case, maps, bias=batch % 2 == 0)
        y = case.run(maps)
        assert y.is_contiguous(memory_format=torch.channels_last)
        rows = ops.masked_linear(maps.permute(0, 2, 3, 1), case.packed)
        assert torch.equal(y, rows.permute(0, 3, 1, 2))


@pytest.mark.parametrize("format", ["index", "bitmap"])
def test_masked_conv2d_of_nothing(format: str, kernel: str) -> None:
    for rows, channels, batch in [(5, 4, 0), (0, 4, 2), (0, 4, 0)]:
        case = make(rows, channels, (3, 3), 1.0, format=format, padding=1)
        x = torch.randn(batch, channels, 6, 7, requires_grad=True)
        for bias in (None, case.bias):
            y = case.run(x, bias)
            assert y.shape == (batch, rows, 6, 7)
        by_x, by_values = torch.autograd.grad(y.sum(), (x, case.packed.values))
        assert torch.equal(by_x, torch.zeros(batch, channels, 6, 7))
        assert torch.equal(by_values, torch.zeros(case.packed.nnz))


def test_masked_conv2d_reads_x_where_a_weight_is_kept_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_masked_conv, "conv_kernel", lambda *_: "direct")
    mask = torch.tensor([[True, False], [False, True]])
    packed = pk.PackedWeight.from_dense(torch.ones(2, 2), mask)
    for batch in (1, 2, 20):
        x = torch.ones(batch, 2, 3, 3)
        x[:, 0] = torch.nan
        y = ops.masked_conv2d(x, packed, kernel=1)
        assert bool(torch.isnan(y[:, 0]).all())
        assert torch.equal(y[:, 1], torch.ones(batch, 3, 3))


@pytest.mark.parametrize("batch", [1, 7, 34])
@pytest.mark.parametrize("stride", [1, 2])
def test_masked_conv2d_has_the_same_bits_for_any_number_of_threads(batch: int, stride: int) -> None:
    case = make(130, 120, (3, 3), 0.1, padding=1, stride=stride)
    x, high = torch.randn(batch, 120, 15, 14), 15 if stride == 1 else 8
    g = torch.randn(batch, 130, high, 14 // stride)

    def run() -> list[Tensor]:
        inputs = [x.clone().requires_grad_(), case.packed.values]
        bias = case.bias.clone().requires_grad_()
        y = case.run(inputs[0], bias)
        return [y, *torch.autograd.grad(y, [*inputs, bias], g)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_masked_conv, "conv_kernel", lambda *_: "direct")
        same_for_any_team(run)


def test_the_gradient_of_one_bias_has_the_same_bits_for_any_number_of_threads() -> None:
    case = make(1, 2, (1, 1), 1.0)
    x, g = torch.randn(30, 2, 100, 100), torch.randn(30, 1, 100, 100)

    def run() -> list[Tensor]:
        bias = torch.zeros(1, requires_grad=True)
        return list(torch.autograd.grad(case.run(x, bias), bias, g))

    same_for_any_team(run)
    assert error(run()[0], g.double().sum().reshape(1)) < 1e-5


def test_masked_conv2d_rounds_alike_wherever_an_image_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_masked_conv, "conv_kernel", lambda *_: "direct")
    case, image = layer("3x3", 0.4), torch.randn(16, 13, 14)
    for batch in (1, 2, 15, 16, 17, 40):
        found = case.run(image.expand(batch, 16, 13, 14))
        assert torch.equal(found, case.run(image).expand_as(found))


@pytest.mark.parametrize("name", ["3x3-stride2", "dilated", "groups"])
def test_masked_conv2d_gradcheck_and_gradgradcheck(name: str) -> None:
    _, _, window, conv = LAYERS[name]
    groups = 2 if "groups" in conv else 1
    case = make(4, 2, window, 0.5, torch.float64, **{**conv, "groups": groups})
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    bias = case.bias.clone().requires_grad_()

    def function(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.paikern.masked_conv2d(x, values, bias, *case.where())

    inputs = (x, case.packed.values, bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_native_second_derivatives_equal_those_of_the_reference(kernel: str) -> None:
    case = layer("3x3-stride2", 0.3)
    x = torch.randn(4, 9, 12, 11, requires_grad=True)
    g = torch.randn(case.run(x).shape)

    def second() -> tuple[Tensor, ...]:
        y = case.run(x).tanh()
        first = torch.autograd.grad(y, (x, case.packed.values), g, create_graph=True)
        total = sum(part.square().sum() for part in first)
        return torch.autograd.grad(total, (x, case.packed.values))

    native = second()
    with registry.using("reference"):
        reference = second()
    for a, b in zip(native, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("format", ["index", "bitmap"])
def test_masked_conv2d_opcheck(format: str) -> None:
    case = make(4, 6, (3, 2), 0.5, format=format, padding=(1, 0), stride=(1, 2), groups=2)
    x = torch.randn(2, 6, 5, 6, requires_grad=True)
    g = torch.randn(2, 4, 5, 3, requires_grad=True)
    values, operations, where = case.packed.values, torch.ops.paikern, case.where()
    torch.library.opcheck(operations.masked_conv2d, (x, values, case.bias, *where))
    torch.library.opcheck(operations.masked_conv2d, (x, values, None, *where))
    torch.library.opcheck(operations.masked_conv2d_input, (g, values, *where, [5, 6]))
    torch.library.opcheck(operations.masked_conv2d_kept, (g, x, *where))
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(operations.masked_conv2d, (last, values, case.bias, *where))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        case = layer("3x3", 0.4)
        self.weight, self.bias = case.packed, torch.nn.Parameter(case.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.masked_conv2d(x, self.weight, self.bias, kernel=3, padding=1).relu()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=ids)
def test_masked_conv2d_compiles_without_graph_breaks(
    format: torch.memory_format, kernel: str
) -> None:
    torch._dynamo.reset()
    net = Net()
    x = torch.randn(6, 16, 8, 9).to(memory_format=format).requires_grad_()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for batch in (6, 5):
        found = torch.autograd.grad(compiled(x[:batch]).sum(), (x, *net.parameters()))
        expected = torch.autograd.grad(net(x[:batch]).sum(), (x, *net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_masked_conv2d_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    net, x = Net(), torch.randn(6, 16, 8, 9)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net.weight.values.grad is not None


def test_masked_conv2d_on_meta_tensors() -> None:
    case = layer("dilated", 0.5)
    where = [t.to("meta") if isinstance(t, Tensor) else t for t in case.where()]
    values, x = case.packed.values.detach().to("meta"), torch.empty(2, 6, 9, 8, device="meta")
    y = torch.ops.paikern.masked_conv2d(x, values, None, *where)
    assert y.shape == F.conv2d(torch.empty(2, 6, 9, 8), case.dense, **case.conv).shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_masked_conv2d_under_autocast(dtype: torch.dtype) -> None:
    case = layer("3x3", 0.4)
    x = torch.randn(6, 16, 7, 7, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = case.run(x, case.bias)
    assert y.dtype == dtype
    truth = F.conv2d(x.double(), case.dense.double(), case.bias.double(), **case.conv)
    assert error(y, truth) <= 2 * EXCESS[dtype]
    y.float().sum().backward()
    assert x.grad is not None
    assert case.packed.values.grad is not None
    assert x.grad.dtype == case.packed.values.grad.dtype == torch.float32


def test_masked_conv2d_in_float64_and_by_reference() -> None:
    check(layer("3x3", 0.6, torch.float64), torch.randn(3, 16, 5, 6, dtype=torch.float64))
    narrow = layer("dilated", 0.3)
    with registry.using("reference"):
        check(narrow, torch.randn(4, 6, 9, 9))


def test_masked_conv2d_names_what_is_wrong() -> None:
    case = layer("3x3", 0.5)
    x = torch.randn(2, 16, 5, 5)
    with pytest.raises(ValueError, match=r"needs maps \[batch, 16, 2 spatial axes\]"):
        case.run(torch.randn(2, 15, 5, 5))
    with pytest.raises(ValueError, match=r"x must be \[batch, in, H, W\] or \[in, H, W\], got"):
        case.run(torch.randn(16, 5))
    with pytest.raises(ValueError, match=r"kernel must divide the 144 columns .* got \(5, 5\)"):
        ops.masked_conv2d(x, case.packed, kernel=5)
    with pytest.raises(ValueError, match=r"kernel must be one integer or two, got \(3, 3, 1\)"):
        ops.masked_conv2d(x, case.packed, kernel=(3, 3, 1))
    with pytest.raises(ValueError, match="stride must be 2 integers >= 1"):
        ops.masked_conv2d(x, case.packed, kernel=3, stride=0)
    with pytest.raises(ValueError, match="groups must divide the 20 rows of the weight, got 3"):
        ops.masked_conv2d(torch.randn(2, 48, 5, 5), case.packed, kernel=3, groups=3)
    with pytest.raises(ValueError, match="is larger than the map"):
        ops.masked_conv2d(torch.randn(2, 16, 2, 5), case.packed, kernel=3)
    with pytest.raises(ValueError, match=r"bias must be \[20\] .* got \(7,\)"):
        case.run(x, torch.randn(7))
    with pytest.raises(TypeError, match=r"x is torch.float64 and the weight torch.float32"):
        case.run(x.double())
    with pytest.raises(TypeError, match=r"bias is torch.bfloat16 and the weight torch.float32"):
        case.run(x, case.bias.bfloat16())
    with pytest.raises(TypeError, match="weight must be a PackedWeight, got Tensor"):
        ops.masked_conv2d(x, case.dense, kernel=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x is on meta and the weight on cpu; move them to one"):
        case.run(x.to("meta"))


ISA_CODE = """
import torch
from paikern.backends import cpu, cpu_masked_conv
print(cpu.isa())
cpu_masked_conv.conv_kernel = lambda *_: "direct"
from python_tests.ops import test_masked_conv2d as tests
torch.manual_seed(0)
for name in tests.LAYERS:
    for density in (0.0, 0.1, 1.0):
        tests.test_masked_conv2d_equals_the_definition(name, density, "direct")
for dtype in tests.DTYPES:
    for format in ("index", "bitmap"):
        tests.test_masked_conv2d_in_every_dtype_and_format(dtype, format, "3x3-stride2", "direct")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_masked_conv2d_of_each_instruction_set(isa: str) -> None:
    environment = {**os.environ, "PAIKERN_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ISA_CODE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() != isa:
        pytest.skip(f"this CPU has no {isa}: ran {run.stdout.strip()}")
