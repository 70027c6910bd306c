from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from python_tests.ops.path_cases import GEOMETRIES, Geometry, exact, geometries, keep, within


def adjoint(geometry: Geometry, values: Tensor, g: Tensor) -> Tensor:
    x = geometry.x().to(g.dtype).requires_grad_()
    return torch.autograd.grad(geometry.conv(x, values), x, g)[0]


def check(geometry: Geometry, dtype: torch.dtype, density: float | None, power: int) -> None:
    weight, x, g = geometry.weight(dtype), geometry.x(), geometry.g()
    mask, packed = keep(weight, density) if density is not None else (None, None)
    values = exact(weight, power, mask)
    found = ops.path_conv_backward(
        weight, g, list(x.shape), *geometry.args, power=power, mask=packed
    )
    within(found, adjoint(geometry, values.float(), g), adjoint(geometry, values, g.double()))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [None, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_path_conv_backward_equals_the_definition(
    geometry: Geometry, density: float | None, power: int
) -> None:
    check(geometry, torch.float32, density, power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [None, 0.1])
def test_path_conv_backward_reads_half_weights(dtype: torch.dtype, density: float | None) -> None:
    check(GEOMETRIES[4], dtype, density, 1)


@settings(max_examples=150, deadline=None)
@given(geometries(), st.sampled_from([None, 0.0, 0.05, 0.3, 0.9]), st.integers(0, 2))
def test_path_conv_backward_over_geometries(
    geometry: Geometry, density: float | None, power: int
) -> None:
    check(geometry, torch.float32, density, power)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [None, 0.2])
def test_path_conv_backward_is_the_adjoint(geometry: Geometry, density: float | None) -> None:
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    packed = keep(weight, density)[1] if density else None
    forward = ops.path_conv_forward(weight, x, *geometry.args, mask=packed).double() * g
    back = ops.path_conv_backward(weight, g, list(x.shape), *geometry.args, mask=packed)
    torch.testing.assert_close(forward.sum(), (back.double() * x).sum(), rtol=1e-6, atol=0)


def test_path_conv_backward_by_hand() -> None:
    weight = torch.tensor([[[1.0, -2.0]]])
    found = ops.path_conv_backward(weight, torch.ones(1, 1, 4), [1, 1, 3], [1], [1], [1], 1)
    assert found.tolist() == [[[3.0, 3.0, 3.0]]]
    # stride 2 with a kernel of 1: every other position has no path
    found = ops.path_conv_backward(
        torch.ones(1, 1, 1), torch.ones(1, 1, 3), [1, 1, 6], [2], [0], [1], 1
    )
    assert found.tolist() == [[[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]]]


def test_path_conv_backward_runs_a_transposed_convolution() -> None:
    weight, x = torch.rand(6, 4, 3, 3), torch.rand(2, 6, 5, 5)
    expected = torch.nn.functional.conv_transpose2d(
        x, weight, None, stride=2, padding=1, output_padding=1, groups=2
    )
    found = ops.path_conv_backward(weight, x, list(expected.shape), [2, 2], [1, 1], [1, 1], 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_path_conv_backward_dense_and_sparse_plans_agree(
    geometry: Geometry, density: float
) -> None:
    weight, g, size = geometry.weight(), geometry.g(), list(geometry.x().shape)
    mask, packed = keep(weight, density)
    sparse = ops.path_conv_backward(weight, g, size, *geometry.args, mask=packed)
    dense = ops.path_conv_backward(torch.where(mask, weight, 0.0), g, size, *geometry.args)
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("density", [0.15, 0.9])
def test_path_conv_backward_has_the_same_bits_for_any_number_of_threads(density: float) -> None:
    weight, g = torch.randn(128, 128, 3, 3), torch.rand(1, 128, 30, 30)
    _, packed = keep(weight, density)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(
                ops.path_conv_backward(
                    weight, g, [1, 128, 30, 30], [1, 1], [1, 1], [1, 1], 1, mask=packed
                )
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


def test_path_conv_backward_of_nothing() -> None:
    args = ([1, 1], [1, 1], [1, 1], 1)
    found = ops.path_conv_backward(
        torch.randn(4, 3, 3, 3), torch.rand(0, 4, 5, 5), [0, 3, 5, 5], *args
    )
    assert found.shape == (0, 3, 5, 5)
    found = ops.path_conv_backward(
        torch.randn(0, 3, 3, 3), torch.rand(2, 0, 5, 5), [2, 3, 5, 5], *args
    )
    assert torch.equal(found, torch.zeros(2, 3, 5, 5))


@pytest.mark.parametrize("geometry", [GEOMETRIES[1], GEOMETRIES[6]], ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_path_conv_backward_gradcheck(geometry: Geometry, power: int) -> None:
    weight = geometry.weight(torch.float64).requires_grad_()
    g, size = geometry.g().double().requires_grad_(), list(geometry.x().shape)
    packed = keep(weight, 0.5)[1]
    assert torch.autograd.gradcheck(
        lambda w, v: ops.path_conv_backward(w, v, size, *geometry.args, power=power, mask=packed),
        (weight, g),
        fast_mode=True,
    )


@pytest.mark.parametrize("power", [0, 1])
def test_path_conv_backward_opcheck(power: int) -> None:
    geometry = GEOMETRIES[3]
    weight, g = geometry.weight().requires_grad_(power > 0), geometry.g().requires_grad_()
    size = list(geometry.x().shape)
    for packed in (None, keep(weight, 0.5)[1]):
        torch.library.opcheck(
            torch.ops.paikern.path_conv_backward, (weight, g, size, *geometry.args, power, packed)
        )


def test_path_conv_backward_names_what_is_wrong() -> None:
    weight, one = torch.randn(4, 3, 3, 3), [1, 1]
    with pytest.raises(ValueError, match=r"g must have shape \(1, 4, 5, 5\)"):
        ops.path_conv_backward(weight, torch.rand(1, 4, 6, 5), [1, 3, 5, 5], one, one, one, 1)
