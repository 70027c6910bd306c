from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from paikern import ops
from python_tests.ops.path_cases import (
    DTYPES,
    GEOMETRIES,
    Geometry,
    exact,
    geometries,
    ids,
    keep,
    within,
)


def check(geometry: Geometry, dtype: torch.dtype, density: float | None, power: int) -> None:
    weight, x = geometry.weight(dtype), geometry.x()
    mask, packed = keep(weight, density) if density is not None else (None, None)
    values = exact(weight, power, mask)
    found = ops.path_conv_forward(weight, x, *geometry.args, power=power, mask=packed)
    within(found, geometry.conv(x, values.float()), geometry.conv(x.double(), values))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [None, 0.02, 0.3, 0.9])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_path_conv_forward_equals_the_definition(
    geometry: Geometry, density: float | None, power: int
) -> None:
    check(geometry, torch.float32, density, power)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("density", [None, 0.1])
def test_path_conv_forward_reads_half_weights(dtype: torch.dtype, density: float | None) -> None:
    check(GEOMETRIES[4], dtype, density, 1)


@settings(max_examples=150, deadline=None)
@given(geometries(), st.sampled_from([None, 0.0, 0.05, 0.3, 0.9]), st.integers(0, 2))
def test_path_conv_forward_over_geometries(
    geometry: Geometry, density: float | None, power: int
) -> None:
    check(geometry, torch.float32, density, power)


def test_path_conv_forward_by_hand() -> None:
    weight = torch.tensor([[[1.0, -2.0]]])
    found = ops.path_conv_forward(weight, torch.ones(1, 1, 3), [1], [1], [1], 1)
    assert found.tolist() == [[[2.0, 3.0, 3.0, 1.0]]]
    # the poster's counts: a 3x3 mask of ones counts 4, 6 and 9 paths with zero padding
    counts = ops.path_conv_forward(
        torch.empty(1, 1, 3, 3), torch.ones(1, 1, 3, 3), [1, 1], [1, 1], [1, 1], 1, power=0
    )
    assert counts[0, 0].tolist() == [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [0.05, 0.3])
def test_path_conv_forward_dense_and_sparse_plans_agree(geometry: Geometry, density: float) -> None:
    weight, x = geometry.weight(), geometry.x()
    mask, packed = keep(weight, density)
    sparse = ops.path_conv_forward(weight, x, *geometry.args, mask=packed)
    dense = ops.path_conv_forward(torch.where(mask, weight, 0.0), x, *geometry.args)
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("density", [None, 0.1])
@pytest.mark.parametrize("size", [5, 23, 40])
def test_path_conv_forward_ties_are_exact(density: float | None, size: int) -> None:
    # constant maps: every inner position sees the same values and must give the same bits
    weight = torch.randn(9, 50, 3, 3)
    packed = keep(weight, density)[1] if density else None
    x = torch.rand(1, 50, 1, 1).expand(1, 50, size, size)
    found = ops.path_conv_forward(weight, x, [1, 1], [1, 1], [1, 1], 1, mask=packed)
    inner = found[:, :, 1:-1, 1:-1]
    assert torch.equal(inner, inner[:, :, :1, :1].expand_as(inner))
    pooled, where = F.max_pool2d(inner, size - 2, return_indices=True)
    assert where.unique().tolist() == [0]
    assert torch.equal(pooled, inner[:, :, :1, :1])


def test_path_conv_forward_one_image_at_a_time() -> None:
    geometry = GEOMETRIES[3]
    weight, x = geometry.weight(), torch.rand(5, 3, 12, 11)
    together = ops.path_conv_forward(weight, x, *geometry.args)
    apart = [ops.path_conv_forward(weight, image[None], *geometry.args) for image in x]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("density", [0.15, 0.9])
def test_path_conv_forward_has_the_same_bits_for_any_number_of_threads(density: float) -> None:
    weight, x = torch.randn(128, 128, 3, 3), torch.rand(1, 128, 30, 30)
    _, packed = keep(weight, density)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(ops.path_conv_forward(weight, x, [1, 1], [1, 1], [1, 1], 1, mask=packed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


@pytest.mark.slow
def test_path_conv_forward_large_batches_in_passes() -> None:
    # 40 images of 64 x 64 x 64 planes exceed 32 MB: more than one pass
    weight, x = torch.randn(3, 64, 3, 3), torch.rand(40, 64, 64, 64)
    found = ops.path_conv_forward(weight, x, [1, 1], [1, 1], [1, 1], 1)
    last = ops.path_conv_forward(weight, x[-1:], [1, 1], [1, 1], [1, 1], 1)
    assert torch.equal(found[-1:], last)


def test_path_conv_forward_of_nothing() -> None:
    args = ([1, 1], [1, 1], [1, 1], 1)
    empty = ops.path_conv_forward(torch.randn(4, 3, 3, 3), torch.rand(0, 3, 5, 5), *args)
    assert empty.shape == (0, 4, 5, 5)
    none = ops.path_conv_forward(torch.randn(4, 0, 3, 3), torch.rand(2, 0, 5, 5), *args)
    assert torch.equal(none, torch.zeros(2, 4, 5, 5))


def test_path_conv_forward_takes_strided_tensors() -> None:
    weight = torch.randn(3, 3, 4, 6).permute(3, 2, 0, 1)
    x = torch.rand(2, 10, 10, 4).permute(0, 3, 1, 2)
    args = ([1, 1], [1, 1], [1, 1], 1)
    expected = ops.path_conv_forward(weight.contiguous(), x.contiguous(), *args)
    assert torch.equal(ops.path_conv_forward(weight, x, *args), expected)


@pytest.mark.parametrize("geometry", [GEOMETRIES[1], GEOMETRIES[6]], ids=str)
@pytest.mark.parametrize("power", [1, 2])
def test_path_conv_forward_gradcheck(geometry: Geometry, power: int) -> None:
    weight = geometry.weight(torch.float64).requires_grad_()
    x = geometry.x().double().requires_grad_()
    packed = keep(weight, 0.5)[1]
    assert torch.autograd.gradcheck(
        lambda w, v: ops.path_conv_forward(w, v, *geometry.args, power=power, mask=packed),
        (weight, x),
        fast_mode=True,
    )


@pytest.mark.parametrize("power", [0, 1])
def test_path_conv_forward_opcheck(power: int) -> None:
    geometry = GEOMETRIES[3]
    weight, x = geometry.weight().requires_grad_(power > 0), geometry.x().requires_grad_()
    for packed in (None, keep(weight, 0.5)[1]):
        torch.library.opcheck(
            torch.ops.paikern.path_conv_forward, (weight, x, *geometry.args, power, packed)
        )


def test_path_conv_forward_names_what_is_wrong() -> None:
    weight, x = torch.randn(4, 3, 3, 3), torch.rand(1, 3, 5, 5)
    one = [1, 1]
    with pytest.raises(ValueError, match=r"needs maps \[batch, 6, 2 spatial axes\]"):
        ops.path_conv_forward(weight, x, one, one, one, 2)
    with pytest.raises(ValueError, match="groups must divide the 4 rows of the weight, got 3"):
        ops.path_conv_forward(weight, torch.rand(1, 9, 5, 5), one, one, one, 3)
    with pytest.raises(ValueError, match=r"stride must be 2 integers >= 1, got \[0, 1\]"):
        ops.path_conv_forward(weight, x, [0, 1], one, one, 1)
    with pytest.raises(ValueError, match=r"padding must be 2 integers >= 0, got \[1\]"):
        ops.path_conv_forward(weight, x, one, [1], one, 1)
    with pytest.raises(ValueError, match="is larger than the map"):
        ops.path_conv_forward(weight, x, one, [0, 0], [3, 1], 1)
    with pytest.raises(ValueError, match="1 to 3 kernel axes"):
        ops.path_conv_forward(weight[0, 0], x, [], [], [], 1)
