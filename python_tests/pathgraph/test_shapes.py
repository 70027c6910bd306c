"""Shapes written out against the CPU kernels: shape, dtype and layout, or the same refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paikern.pathgraph import rules, shapes

aten = torch.ops.aten
REFUSALS = (RuntimeError, IndexError, ValueError, ZeroDivisionError)


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape).to(dtype)


X = t(2, 6, 5, 4)
NHWC = X.contiguous(memory_format=torch.channels_last)
TURNED = t(2, 5, 6, 4).transpose(1, 2)
GAPS = t(2, 5, 6, 8).transpose(1, 2)[..., ::2]
LAYOUTS = {"contiguous": X, "channels last": NHWC, "turned": TURNED, "gaps": GAPS}

UNARY = "relu gelu silu sigmoid tanh hardswish elu neg exp sqrt rsqrt softplus".split()


def check(func: Any, *args: Any, **kwargs: Any) -> None:
    """`shapes.of` on meta twins says what the kernel does on the tensors themselves."""

    def twin(x: Any) -> Any:
        if isinstance(x, list):
            return [twin(y) for y in x]
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    name = rules.op_name(func)
    twins = [twin(x) for x in args]
    try:
        expected = func(*args, **kwargs)
    except REFUSALS:
        with pytest.raises(REFUSALS):
            shapes.of(func, name, twins, kwargs)
        return
    found = shapes.of(func, name, twins, kwargs)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    wide = [d for d in range(found.dim()) if found.shape[d] > 1]
    assert [found.stride(d) for d in wide] == [expected.stride(d) for d in wide]
    if expected is args[0]:
        assert found is twins[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_tensor(name: str, layout: str) -> None:
    check(getattr(aten, name).default, LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["relu_", "silu_", "elu_", "hardtanh_"])
def test_in_place(name: str, layout: str) -> None:
    check(getattr(aten, name).default, LAYOUTS[layout].clone())


OTHERS = {
    "same": t(2, 6, 5, 4),
    "row": t(4),
    "column": t(5, 1),
    "channel": t(6, 1, 1),
    "number": 2.5,
    "integer": 3,
    "scalar": torch.tensor(2.0),
    "double": t(4, dtype=torch.float64),
    "zero dimensions, double": torch.tensor(2.0, dtype=torch.float64),
    "wider": t(3, 1, 6, 5, 4),
    "misfit": t(3),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["add", "mul", "div", "sub_", "mul_"])
def test_two_tensors(name: str, layout: str, other: str) -> None:
    y = OTHERS[other]
    overload = getattr(aten, name).Tensor
    check(overload, LAYOUTS[layout].clone(), y)
    if isinstance(y, Tensor) and not name.endswith("_"):
        check(overload, y, LAYOUTS[layout])


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 5), (2, 0, 4)])
@pytest.mark.parametrize("bias", [None, t(7), t(6)])
def test_linear(shape: tuple[int, ...], bias: Tensor | None) -> None:
    check(aten.linear.default, t(*shape), t(7, 4), bias)
    check(aten.linear.default, t(*shape).double(), t(7, 4).double())


CONVOLUTIONS = {
    "plain": (t(1, 4, 9), t(6, 4, 3), t(6), [2], [1], [1], 1),
    "2d": (t(1, 4, 9, 8), t(6, 4, 3, 2), None, [2, 1], [1, 0], [1, 2], 1),
    "one number": (t(1, 4, 9, 8), t(6, 4, 3, 3), None, [1], [1], [1], 1),
    "groups": (t(2, 4, 9, 8), t(6, 2, 3, 3), t(6), [1, 1], [1, 1], [1, 1], 2),
    "depthwise 3d": (t(1, 4, 5, 5, 5), t(4, 1, 2, 2, 2), None, [1] * 3, [0] * 3, [1] * 3, 4),
    "unbatched": (t(4, 9, 8), t(6, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], 1),
    "channels": (t(1, 5, 9, 8), t(6, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], 1),
    "too large": (t(1, 4, 2, 2), t(6, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], 1),
    "no stride": (t(1, 4, 9, 8), t(6, 4, 3, 3), None, [0, 0], [0, 0], [1, 1], 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    args = CONVOLUTIONS[name]
    check(getattr(aten, f"conv{len(args[3]) if name != 'one number' else 2}d").default, *args)


POOLS = {
    "plain": ([2],),
    "stride": ([3, 2], [2, 1], [1, 1]),
    "dilation": ([2, 2], [1], [0, 0], [2, 1]),
    "ceil": ([2, 3], [2], [0], [1], True),
    "padding": ([2, 2], [2, 2], [2, 2]),
    "too large": ([7, 7],),
    "no stride": ([2, 2], [0, 0]),
}


@pytest.mark.parametrize("name", POOLS)
def test_max_pools(name: str) -> None:
    check(aten.max_pool2d.default, X, *POOLS[name])
    check(aten.max_pool2d.default, NHWC, *POOLS[name])
    check(aten.max_pool2d.default, X[0], *POOLS[name])
    if len(POOLS[name]) == 1:
        check(aten.max_pool1d.default, t(2, 3, 9), POOLS[name][0][:1])
        check(aten.max_pool3d.default, t(2, 3, 4, 5, 6), POOLS[name][0][:1])


def test_norms() -> None:
    vector, off = t(6), t(5)
    batch = aten.batch_norm.default
    check(batch, X, vector, vector, vector, vector, False, 0.1, 1e-5, False)
    check(batch, X, None, None, vector, vector, False, 0.1, 1e-5, False)
    check(batch, X, off, off, vector, vector, False, 0.1, 1e-5, False)
    for shape, weight in (([4], t(4)), ([5, 4], t(5, 4)), ([4], None), ([5], t(5)), ([4], t(5))):
        check(aten.layer_norm.default, X, shape, weight, weight)
        check(aten.rms_norm.default, X, shape, weight)


@pytest.mark.parametrize("size", [[1, 1], [2, 3], [5, 4]])
def test_adaptive_pools(size: list[int]) -> None:
    check(aten.adaptive_avg_pool2d.default, X, size)


@pytest.mark.parametrize("dim", [0, 1, -1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cat(layout: str, dim: int) -> None:
    x = LAYOUTS[layout]
    check(aten.cat.default, [x, x, x], dim)
    check(aten.cat.default, [x, X], dim)
    check(aten.cat.default, [x, x[:, :3]], dim)
    check(aten.cat.default, [t(2, 3), t(2, 4)], 1)


def test_embedding() -> None:
    ids = torch.tensor([[1, 2, 3]])
    check(aten.embedding.default, t(9, 4), ids)
    check(aten.embedding.default, t(9, 4), ids.int(), 0)
    check(aten.embedding.default, t(9, 4), ids.float())


Q = t(2, 5, 4, 8).transpose(1, 2)
ATTENTION = {
    "plain": ((Q, Q, Q), {}),
    "cross": ((Q, t(2, 4, 7, 8), t(2, 4, 7, 8)), {}),
    "masked": ((Q, Q, Q, t(5, 5)), {}),
    "grouped": ((Q, t(2, 2, 5, 8), t(2, 2, 5, 8)), {"enable_gqa": True}),
    "scaled": ((Q, Q, Q), {"scale": 0.5}),
    "widths": ((Q, t(2, 4, 7, 6), t(2, 4, 7, 8)), {}),
    "heads": ((Q, t(2, 3, 5, 8), t(2, 3, 5, 8)), {}),
    "mask": ((Q, Q, Q, t(5, 4)), {}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str) -> None:
    args, options = ATTENTION[name]
    check(aten.scaled_dot_product_attention.default, *args, **options)
