from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import paikern as pk
from paikern import ops
from paikern.backends import registry
from python_tests.ops.masked_linear_cases import DENSITIES, DTYPES, check, make, within

SHAPES = [(1, 1), (31, 33), (33, 31), (1, 300), (300, 1), (257, 130), (65, 300)]
BATCHES = [1, 2, 3, 4, 15, 16, 17, 33, 48, 64, 65]
ROOT = Path(__file__).parents[2]


def ids(value: object) -> str:
    return str(value).replace("torch.", "").replace(", ", "x").strip("()")


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("density", DENSITIES)
def test_masked_linear_equals_the_definition(shape: tuple[int, int], density: float) -> None:
    case = make(*shape, density)
    for batch in BATCHES:
        check(case, torch.randn(batch, shape[1]), bias=batch % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.9])
def test_masked_linear_in_every_dtype_and_format(
    dtype: torch.dtype, format: str, density: float
) -> None:
    case = make(70, 90, density, dtype, format=format)
    for batch in (1, 2, 5, 40, 130):
        check(case, torch.randn(batch, 90).to(dtype))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 65),
    st.floats(0, 1),
    st.sampled_from([1, 16, 64, 4096]),
)
def test_masked_linear_of_random_shapes(
    rows: int, columns: int, batch: int, density: float, panel: int
) -> None:
    torch.manual_seed(0)
    case = make(rows, columns, density, panel=panel)
    check(case, torch.randn(batch, columns), bias=rows % 2 == 0)


def test_masked_linear_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    mask = torch.tensor([[True, False, True], [False, True, False]])
    packed = pk.PackedWeight.from_dense(weight, mask)
    x = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, -2.0]], requires_grad=True)
    bias = torch.tensor([10.0, 20.0], requires_grad=True)
    y = ops.masked_linear(x, packed, bias)
    assert y.tolist() == [[13.0, 26.0], [9.0, 23.0]]
    y.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert x.grad is not None
    assert bias.grad is not None
    assert packed.values.grad is not None
    assert x.grad.tolist() == [[1.0, 6.0, 0.5], [3.0, 12.0, 1.5]]
    assert packed.values.grad.tolist() == [1.0, -2.0, 8.0]  # (0, 0), (0, 2), (1, 1)
    assert bias.grad.tolist() == [4.0, 6.0]


@pytest.mark.parametrize("columns", [65_535, 65_536, 65_537, 140_000])
@pytest.mark.parametrize("panel", [4096, 65_536])
def test_masked_linear_with_more_columns_than_16_bits(columns: int, panel: int) -> None:
    case = make(5, columns, 0.01, panel=panel)
    for batch in (1, 2, 3, 20):
        check(case, torch.randn(batch, columns))


def test_masked_linear_with_more_rows_than_16_bits() -> None:
    case = make(140_000, 5, 0.1)
    for batch in (1, 3):
        check(case, torch.randn(batch, 5))


@pytest.mark.parametrize("batch", [1, 2, 3, 40])
def test_masked_linear_takes_any_layout_of_x(batch: int) -> None:
    case = make(40, 60, 0.2)
    check(case, torch.randn(60, batch).T)
    check(case, torch.randn(batch, 120)[:, ::2])
    check(case, torch.randn(1, 60).expand(batch, 60))
    check(case, torch.randn(2, batch, 3, 60))
    check(case, torch.randn(60, batch, 2).permute(2, 1, 0))
    check(case, torch.randn(60))


def test_masked_linear_of_a_batch_beyond_one_set_of_panels() -> None:
    check(make(20, 30, 0.3), torch.randn(2500, 30))


@pytest.mark.parametrize(
    ("rows", "columns", "batch"), [(0, 5, 2), (5, 0, 2), (5, 7, 0), (0, 0, 0), (0, 0, 3)]
)
@pytest.mark.parametrize("format", ["index", "bitmap"])
def test_masked_linear_of_nothing(rows: int, columns: int, batch: int, format: str) -> None:
    case = make(rows, columns, 1.0, format=format)
    x = torch.randn(batch, columns, requires_grad=True)
    for bias in (None, case.bias):
        y = ops.masked_linear(x, case.packed, bias)
        assert torch.equal(y, (torch.zeros(rows) if bias is None else bias).expand(batch, rows))
    by_x, by_values = torch.autograd.grad(y.sum(), (x, case.packed.values))
    assert torch.equal(by_x, torch.zeros(batch, columns))
    assert torch.equal(by_values, torch.zeros(case.packed.nnz))


def test_masked_linear_reads_x_where_a_weight_is_kept_only() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    packed = pk.PackedWeight.from_dense(torch.ones(2, 3), mask)
    for batch in (1, 2, 20):
        x = torch.ones(batch, 3)
        x[:, 0] = torch.nan
        y = ops.masked_linear(x, packed)
        assert bool(torch.isnan(y[:, 0]).all())
        assert y[:, 1].tolist() == [2.0] * batch


@pytest.mark.parametrize("batch", [1, 2, 7, 70])
def test_masked_linear_has_the_same_bits_for_any_number_of_threads(batch: int) -> None:
    case = make(2100, 3000, 0.2)  # more than one thread's work, for a single row of x too
    x, g = torch.randn(batch, 3000), torch.randn(batch, 2100)

    def run() -> list[Tensor]:
        inputs = [
            x.clone().requires_grad_(),
            case.packed.values,
            case.bias.clone().requires_grad_(),
        ]
        y = ops.masked_linear(inputs[0], case.packed, inputs[2])
        return [y, *torch.autograd.grad(y, inputs, g)]

    same_for_any_team(run)


def test_the_gradient_of_one_bias_has_the_same_bits_for_any_number_of_threads() -> None:
    case = make(1, 3, 1.0)
    x, g = torch.randn(300_000, 3), torch.randn(300_000, 1)

    def run() -> list[Tensor]:
        bias = torch.zeros(1, requires_grad=True)
        return list(torch.autograd.grad(ops.masked_linear(x, case.packed, bias), bias, g))

    same_for_any_team(run)
    within(run()[0], g.sum(0), g.double().sum(0))


def same_for_any_team(run) -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for some in found for a, b in zip(some, found[0], strict=True))


def test_masked_linear_rounds_alike_in_every_row_of_x() -> None:
    # panels of 64, 48, 32 and 16 rows of x: the same row anywhere gives the same bits
    case, row = make(65, 500, 0.3), torch.randn(500)
    for batch in (131, 100, 83, 70, 30, 3):
        found = ops.masked_linear(row.expand(batch, 500), case.packed)
        assert torch.equal(found, found[:1].expand_as(found))


@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3)], ids=ids)
def test_masked_linear_gradcheck_and_gradgradcheck(format: str, shape: tuple[int, ...]) -> None:
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    weight = torch.randn(3, 3, dtype=torch.float64)
    packed = pk.PackedWeight.from_dense(weight, mask, format=format)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    where = packed.where(transposed=True)

    def function(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.paikern.masked_linear(x, values, bias, *where)

    inputs = (x, packed.values, bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_native_second_derivatives_equal_those_of_the_reference() -> None:
    case = make(40, 50, 0.3)
    x, g = torch.randn(7, 50, requires_grad=True), torch.randn(7, 40)

    def second() -> tuple[Tensor, ...]:
        y = ops.masked_linear(x, case.packed).tanh()
        first = torch.autograd.grad(y, (x, case.packed.values), g, create_graph=True)
        total = sum(part.square().sum() for part in first)
        return torch.autograd.grad(total, (x, case.packed.values))

    native = second()
    with registry.using("reference"):
        reference = second()
    for a, b in zip(native, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["index", "bitmap"])
def test_masked_linear_opcheck(format: str) -> None:
    case = make(5, 7, 0.5, format=format)
    x, g = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    values, operations = case.packed.values, torch.ops.paikern
    for transposed in (False, True):
        where = case.packed.where(transposed=transposed)
        torch.library.opcheck(operations.masked_linear, (x, values, case.bias, *where))
        torch.library.opcheck(operations.masked_linear, (x, values, None, *where))
        torch.library.opcheck(operations.masked_linear_input, (g, values, *where))
        torch.library.opcheck(operations.masked_linear_kept, (g, x, *where))


class Net(torch.nn.Module):
    def __init__(self, format: str = "index") -> None:
        super().__init__()
        case = make(8, 12, 0.4, format=format)
        self.weight, self.bias = case.packed, torch.nn.Parameter(case.bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.masked_linear(x, self.weight, self.bias).relu()


@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_masked_linear_compiles_without_graph_breaks(format: str, backend: str) -> None:
    torch._dynamo.reset()
    net, x = Net(format), torch.randn(6, 12, requires_grad=True)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for batch in (6, 5):
        found = torch.autograd.grad(compiled(x[:batch]).sum(), (x, *net.parameters()))
        expected = torch.autograd.grad(net(x[:batch]).sum(), (x, *net.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_masked_linear_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    net, x = Net(), torch.randn(6, 12)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    compiled(x).sum().backward()
    assert net.weight.values.grad is not None


def test_masked_linear_on_meta_tensors() -> None:
    case = make(5, 7, 0.5)
    where = [
        t.to("meta") if isinstance(t, Tensor) else t for t in case.packed.where(transposed=True)
    ]
    values, x = case.packed.values.detach().to("meta"), torch.empty(2, 3, 7, device="meta")
    assert torch.ops.paikern.masked_linear(x, values, None, *where).shape == (2, 3, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_masked_linear_under_autocast(dtype: torch.dtype) -> None:
    case = make(20, 30, 0.4)
    x = torch.randn(6, 30, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = ops.masked_linear(x, case.packed, case.bias)
    assert y.dtype == dtype
    halves = pk.PackedWeight.from_dense(case.dense.to(dtype), case.mask)
    assert torch.equal(y, ops.masked_linear(x.to(dtype), halves, case.bias.to(dtype)))
    y.float().sum().backward()
    assert x.grad is not None
    assert case.packed.values.grad is not None
    assert x.grad.dtype == case.packed.values.grad.dtype == torch.float32


def test_masked_linear_trains_like_a_dense_masked_layer() -> None:
    case = make(10, 20, 0.3)
    dense = torch.nn.Parameter(case.dense.clone())
    x, target = torch.randn(32, 20), torch.randn(32, 10)
    ours = torch.optim.Adam(case.packed.parameters(), lr=0.05)
    theirs = torch.optim.Adam([dense], lr=0.05)
    for _ in range(20):
        for optimizer, y in (
            (ours, lambda: ops.masked_linear(x, case.packed)),
            (theirs, lambda: x @ (dense * case.mask).T),
        ):
            optimizer.zero_grad()
            (y() - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(case.packed.to_dense(), dense.detach() * case.mask)
    assert ours.state[case.packed.values]["exp_avg"].shape == (case.packed.nnz,)


def test_masked_linear_in_float64_and_by_reference() -> None:
    case = make(5, 7, 0.6, torch.float64)
    check(case, torch.randn(3, 7, dtype=torch.float64))
    narrow = make(30, 40, 0.3)
    with registry.using("reference"):
        check(narrow, torch.randn(9, 40))


def test_masked_linear_names_what_is_wrong() -> None:
    case = make(5, 7, 0.5)
    x = torch.randn(3, 7)
    for shape in [(3, 5), (7, 3), ()]:
        with pytest.raises(
            ValueError, match=r"x must be \[..., 7\] for a weight of shape \(5, 7\)"
        ):
            ops.masked_linear(torch.randn(shape), case.packed)
    with pytest.raises(ValueError, match=r"bias must be \[5\] .* got \(7,\)"):
        ops.masked_linear(x, case.packed, torch.randn(7))
    with pytest.raises(TypeError, match=r"x is torch.float64 and the weight torch.float32"):
        ops.masked_linear(x.double(), case.packed)
    with pytest.raises(TypeError, match=r"bias is torch.bfloat16 and the weight torch.float32"):
        ops.masked_linear(x, case.packed, case.bias.bfloat16())
    with pytest.raises(TypeError, match="weight must be a PackedWeight, got Tensor"):
        ops.masked_linear(x, case.dense)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x is on meta and the weight on cpu; move them to one"):
        ops.masked_linear(x.to("meta"), case.packed)


@pytest.mark.parametrize(("dtype", "panel"), [(torch.float32, 512), (torch.bfloat16, 4096)])
def test_values_of_a_large_transposed_weight(dtype: torch.dtype, panel: int) -> None:
    rows, columns = 2_600, 1_700  # 2 million are kept: collected block by block
    weight = torch.randint(-3, 4, (rows, columns)).to(dtype)
    packed = pk.PackedWeight.from_dense(weight, torch.rand(rows, columns) < 0.46, panel=panel)
    assert packed.nnz > 1_900_000
    g = torch.randint(-4, 5, (3, rows)).float()
    truth = g @ packed.to_dense().detach().float()  # small integers: exact in float32
    for some in (g[:1], g):
        x = torch.zeros(len(some), columns, dtype=dtype, requires_grad=True)
        ops.masked_linear(x, packed).backward(some.to(dtype))
        assert x.grad is not None
        assert torch.equal(x.grad, truth[: len(some)].to(dtype))


ISA_CODE = """
import torch
from paikern.backends import cpu
print(cpu.isa())
from python_tests.ops import test_masked_linear as tests
from python_tests.ops.masked_linear_cases import DTYPES
torch.manual_seed(0)
for shape in ((31, 33), (257, 130), (1, 300), (300, 1)):
    for density in (0.0, 0.05, 0.5, 1.0):
        tests.test_masked_linear_equals_the_definition(shape, density)
for dtype in DTYPES:
    for format in ("index", "bitmap"):
        tests.test_masked_linear_in_every_dtype_and_format(dtype, format, 0.3)
tests.test_masked_linear_with_more_columns_than_16_bits(70_000, 4096)
tests.test_masked_linear_rounds_alike_in_every_row_of_x()
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_masked_linear_of_each_instruction_set(isa: str) -> None:
    environment = {**os.environ, "PAIKERN_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ISA_CODE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    if run.stdout.strip() != isa:
        pytest.skip(f"this CPU has no {isa}: ran {run.stdout.strip()}")
