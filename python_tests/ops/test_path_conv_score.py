from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops
from python_tests.ops.path_cases import (
    GEOMETRIES,
    Geometry,
    exact,
    geometries,
    keep,
    within,
)


def gradient(geometry: Geometry, x: Tensor, g: Tensor) -> Tensor:
    weight = geometry.weight().to(x.dtype).requires_grad_()
    return torch.autograd.grad(geometry.conv(x, weight), weight, g)[0]


def check(geometry: Geometry, dtype: torch.dtype, density: float | None, power: int) -> None:
    weight, x, g = geometry.weight(dtype), geometry.x(), geometry.g()
    mask, packed = keep(weight, density) if density is not None else (None, None)
    values = exact(weight, power, mask)
    found = ops.path_conv_score(weight, x, g, *geometry.args, power=power, mask=packed)
    truth = values * gradient(geometry, x.double(), g.double())
    within(found, values.float() * gradient(geometry, x, g), truth)
    if mask is not None:
        marked = ops.path_conv_score(
            weight, x, g, *geometry.args, power=power, mask=packed, pruned=-1.0
        )
        assert torch.equal(marked, torch.where(mask, found, -1.0))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_path_conv_score_equals_the_definition(
    geometry: Geometry, density: float | None, power: int
) -> None:
    check(geometry, torch.float32, density, power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_path_conv_score_reads_half_weights(dtype: torch.dtype) -> None:
    check(GEOMETRIES[4], dtype, 0.5, 1)


@settings(max_examples=150, deadline=None)
@given(geometries(), st.sampled_from([None, 0.0, 0.3]), st.integers(0, 2))
def test_path_conv_score_over_geometries(
    geometry: Geometry, density: float | None, power: int
) -> None:
    check(geometry, torch.float32, density, power)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((60, 60), (3, 3), (1, 1), (1, 1), (1, 1), rows=20, channels=15, batch=1),
        Geometry((3, 3), (3, 3), (1, 1), (1, 1), (1, 1), rows=300, channels=500, batch=1),
    ],
    ids=["more positions than one panel", "more columns than one tile"],
)
def test_path_conv_score_of_many_tiles(geometry: Geometry) -> None:
    check(geometry, torch.float32, 0.5, 1)


def test_path_conv_score_by_hand() -> None:
    weight = torch.tensor([[[1.0, -2.0]]])
    found = ops.path_conv_score(weight, torch.ones(1, 1, 3), torch.ones(1, 1, 4), [1], [1], [1], 1)
    assert found.tolist() == [[[3.0, 6.0]]]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_path_conv_score_sums_to_the_paths(geometry: Geometry) -> None:
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    total = (ops.path_conv_forward(weight, x, *geometry.args).double() * g).sum()
    score = ops.path_conv_score(weight, x, g, *geometry.args).double().sum()
    torch.testing.assert_close(score, total, rtol=1e-6, atol=0)


def test_path_conv_score_has_the_same_bits_for_any_number_of_threads() -> None:
    weight = torch.randn(128, 128, 3, 3)
    x, g = torch.rand(1, 128, 30, 30), torch.rand(1, 128, 30, 30)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            found.append(ops.path_conv_score(weight, x, g, [1, 1], [1, 1], [1, 1], 1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)


def test_path_conv_score_of_no_batch() -> None:
    weight = torch.randn(4, 3, 3, 3)
    mask, packed = keep(weight, 0.5)
    x, g = torch.rand(0, 3, 5, 5), torch.rand(0, 4, 5, 5)
    found = ops.path_conv_score(weight, x, g, [1, 1], [1, 1], [1, 1], 1, mask=packed, pruned=-1.0)
    assert torch.equal(found, torch.where(mask, 0.0, -1.0))


def test_path_conv_score_opcheck() -> None:
    geometry = GEOMETRIES[3]
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    for packed in (None, keep(weight, 0.5)[1]):
        torch.library.opcheck(
            torch.ops.paikern.path_conv_score, (weight, x, g, *geometry.args, 1, packed, 0.0)
        )


def test_path_conv_score_names_what_is_wrong() -> None:
    weight, x, one = torch.randn(4, 3, 3, 3), torch.rand(1, 3, 5, 5), [1, 1]
    with pytest.raises(ValueError, match=r"path_conv_score: g must have shape \(1, 4, 5, 5\)"):
        ops.path_conv_score(weight, x, torch.rand(1, 4, 4, 4), one, one, one, 1)
