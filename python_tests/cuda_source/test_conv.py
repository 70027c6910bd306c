"""Products with maps by the CUDA sources: batches and convolutions, against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from paikern import ops
from paikern.backends import cuda_path
from paikern.errors import BackendError
from python_tests.cuda_source.path_calls import (
    DTYPES,
    POWERS,
    both,
    close,
    on,
    same_on_all_blocks,
)
from python_tests.ops.path_cases import FEW, GEOMETRIES, Geometry, keep

pytestmark = pytest.mark.cuda_source

# Besides the shared ones: several tiles each way, many positions for the score to cut, depthwise
# with a tile of 16, strides with a common divisor with the dilation, phases without a tap.
MORE = (
    Geometry((9, 30), (3, 3), (1, 1), (1, 1), (1, 1), rows=67, channels=7, batch=1),
    Geometry((3, 3), (3, 3), (1, 1), (1, 1), (1, 1), rows=66, channels=130, batch=1),
    Geometry((25, 24), (3, 3), (1, 1), (1, 1), (1, 1), groups=3, rows=1, channels=1, batch=1),
    Geometry((40, 36), (3, 3), (1, 1), (1, 1), (1, 1), rows=3, channels=2, batch=1),
    Geometry((11, 10), (3, 2), (4, 2), (1, 0), (2, 2), rows=6, channels=5, batch=2),
    Geometry((10,), (2,), (4,), (1,), (2,), rows=3, channels=2, batch=1),
    Geometry((1, 1), (1, 1), (3, 1), (1, 0), (1, 1), rows=3, channels=4, batch=1),
)


@pytest.mark.parametrize("geometry", [*GEOMETRIES, *FEW[:6], *MORE], ids=str)
@pytest.mark.parametrize(
    ("dtype", "power", "masked"),
    [(torch.float32, 1, False), (torch.bfloat16, 2, True), (torch.float16, 0, True)],
    ids=["fp32-p1", "bf16-p2-masked", "fp16-p0-masked"],
)
def test_three_directions(geometry: Geometry, dtype: torch.dtype, power: int, masked: bool) -> None:
    weight, x, g = geometry.weight(dtype), geometry.x(), geometry.g()
    same = {"power": power, "mask": keep(weight, 0.4)[1] if masked else None}
    calls = (
        lambda: ops.path_conv_forward(weight, x, *geometry.args, **same),
        lambda: ops.path_conv_backward(weight, g, list(x.shape), *geometry.args, **same),
        lambda: ops.path_conv_score(weight, x, g, *geometry.args, pruned=-1.0, **same),
    )
    for call in calls:
        close(*both(call))


@pytest.mark.parametrize("batch", [0, 1, 3, 17, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_both_ways_and_their_scores(batch: int, dtype: torch.dtype) -> None:
    weight = torch.randn(31, 33).T.to(dtype)  # not contiguous
    packed = keep(weight, 0.4)[1]
    x, g = torch.rand(batch, 31), torch.rand(batch, 33)
    for power, masked in POWERS:
        how = {"power": power, "mask": packed if masked else None}
        close(*both(lambda h=how: ops.path_forward(weight, x, **h)))
        close(*both(lambda h=how: ops.path_backward(weight, g, **h)))
        close(*both(lambda h=how: ops.path_score(weight, x, g, pruned=-1.0, **h)))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (65, 1000), (1000, 3)], ids=str)
def test_batches_of_odd_weights(shape: tuple[int, int]) -> None:
    weight, x, g = torch.randn(shape), torch.rand(2, shape[1]), torch.rand(2, shape[0])
    close(*both(lambda: ops.path_forward(weight, x)))
    close(*both(lambda: ops.path_backward(weight, g)))
    close(*both(lambda: ops.path_score(weight, x, g)))


@pytest.mark.parametrize("geometry", [MORE[1], MORE[2], MORE[3], GEOMETRIES[8]], ids=str)
def test_bits_do_not_depend_on_the_blocks(geometry: Geometry) -> None:
    weight, x, g = geometry.weight(), geometry.x(), geometry.g()
    size, args = list(x.shape), geometry.args
    same_on_all_blocks(lambda: ops.path_conv_forward(weight, x, *args), (1, 5))
    same_on_all_blocks(lambda: ops.path_conv_backward(weight, g, size, *args), (1, 5))
    same_on_all_blocks(lambda: ops.path_conv_score(weight, x, g, *args), (1, 5))


def test_products_of_a_resnet_fill_a_device() -> None:
    """The first layer's score and the last layers' sweeps have few tiles; they are cut."""
    for name, shape, size, stride, padding in (
        ("score", (64, 3, 7, 7), (1, 3, 224, 224), 2, 3),
        ("forward", (512, 512, 3, 3), (1, 512, 7, 7), 1, 1),
        ("adjoint", (512, 512, 3, 3), (1, 512, 7, 7), 1, 1),
        ("forward", (2048, 512, 1, 1), (1, 512, 7, 7), 1, 0),
    ):
        args = (stride,) * 2, (padding,) * 2, (1, 1), 1
        geometry, _ = cuda_path.conv_geometry(shape, size, *args)
        room = cuda_path.workspace(name, geometry, torch.float32, 1)
        assert room.blocks >= 128, name
        assert room.floats >= room.blocks * 64 * 16
        assert room.floats * 4 < 16 << 20  # in the second cache


def test_positions_that_see_equal_values_are_equal_bit_for_bit() -> None:
    weight, x = torch.randn(3, 5, 3), torch.rand(1, 5, 1).expand(1, 5, 90)
    z = on("cuda_source", lambda: ops.path_conv_forward(weight, x, [1], [1], [1], 1))
    assert torch.equal(z[..., 1:-1], z[..., 1:2].expand(1, 3, 88))


def test_no_sample_is_a_sum_of_nothing() -> None:
    weight, x, g = torch.ones(2, 1, 3), torch.rand(0, 1, 5), torch.rand(0, 2, 3)
    args = ([1], [0], [1], 1)
    found = on("cuda_source", lambda: ops.path_conv_score(weight, x, g, *args))
    assert torch.equal(found, torch.zeros(2, 1, 3))
    assert on("cuda_source", lambda: ops.path_conv_forward(weight, x, *args)).shape == (0, 2, 3)
    back = on("cuda_source", lambda: ops.path_conv_backward(weight, g, [0, 1, 5], *args))
    assert back.shape == (0, 1, 5)


def test_a_nan_reaches_the_positions_that_see_it_unless_it_is_masked() -> None:
    weight, x = torch.ones(1, 1, 3), torch.ones(1, 1, 4)
    weight[0, 0, 0] = math.nan
    mask = ops.pack_mask(weight == weight)
    args = ([1], [1], [1], 1)
    found = on("cuda_source", lambda: ops.path_conv_forward(weight, x, *args))
    assert found[..., 1:].isnan().all()
    found = on("cuda_source", lambda: ops.path_conv_forward(weight, x, *args, mask=mask))
    assert found.tolist() == [[[2.0, 2.0, 2.0, 1.0]]]


def test_maps_that_are_too_large_are_refused() -> None:
    weight, x = torch.ones(1, 1, 1), torch.ones(1).expand(1, 1, 1 << 30)
    with pytest.raises(BackendError, match=r"fewer than 2\*\*30 numbers"):
        on("cuda_source", lambda: ops.path_conv_forward(weight, x, [1 << 29], [0], [1], 1))
