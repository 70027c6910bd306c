"""Convolution path counting in Triton's interpreter, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from paikern import ops
from python_tests.ops.path_cases import TOLERANCE, Geometry, error, keep
from python_tests.triton.helpers import both, on

pytestmark = pytest.mark.triton

# Each axis count; strides with unread phases, groups, depthwise, dilation, several blocks of rows,
# of channels and of positions; a kernel larger than the map.
GEOMETRIES = (
    Geometry((9,), (3,), (1,), (1,), (1,)),
    Geometry((7,), (3,), (3,), (0,), (2,), batch=3),
    Geometry((1,), (4,), (2,), (3,), (1,), groups=2),
    Geometry((12, 11), (3, 3), (1, 1), (1, 1), (1, 1), batch=1),
    Geometry((9, 8), (1, 1), (2, 3), (0, 0), (1, 1), rows=19, channels=17),
    Geometry((8, 7), (3, 2), (1, 2), (2, 0), (2, 3), groups=3, rows=4, batch=1),
    Geometry((5, 5), (3, 3), (2, 2), (1, 1), (1, 1), groups=3, rows=1, channels=1, batch=1),
    Geometry((3, 4, 3), (2, 2, 1), (1, 2, 1), (0, 1, 1), (1, 1, 2), groups=2, batch=1),
)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "power", "masked"),
    [(torch.float32, 1, False), (torch.bfloat16, 2, True), (torch.float16, 0, True)],
    ids=["fp32-p1", "bf16-p2-masked", "fp16-p0-masked"],
)
def test_three_directions(geometry: Geometry, dtype: torch.dtype, power: int, masked: bool) -> None:
    weight, x, g = geometry.weight(dtype), geometry.x(), geometry.g()
    mask = keep(weight, 0.4)[1] if masked else None
    same = {"power": power, "mask": mask}
    calls = (
        lambda: ops.path_conv_forward(weight, x, *geometry.args, **same),
        lambda: ops.path_conv_backward(weight, g, list(x.shape), *geometry.args, **same),
        lambda: ops.path_conv_score(weight, x, g, *geometry.args, pruned=-1.0, **same),
    )
    for call in calls:
        found, wanted = both(call, "reference")
        assert found.dtype == wanted.dtype
        assert error(found, wanted.double()) <= TOLERANCE


def test_positions_that_see_equal_values_are_equal_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interpreter's `tl.dot` is numpy's product, whose kernels for some processors (AMD EPYC)
    add the columns of a block in several orders; here it is one that treats them alike.
    """

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
        return np.einsum("...ik,...kj->...ij", a, b, dtype=dtype, optimize=False)

    monkeypatch.setattr(np, "matmul", matmul)
    weight, x = torch.randn(3, 5, 3), torch.rand(1, 5, 1).expand(1, 5, 90)
    z = on("triton", lambda: ops.path_conv_forward(weight, x, [1], [1], [1], 1))
    assert torch.equal(z[..., 1:-1], z[..., 1:2].expand(1, 3, 88))


def test_no_sample_is_a_sum_of_nothing() -> None:
    weight, x, g = torch.ones(2, 1, 3), torch.rand(0, 1, 5), torch.rand(0, 2, 3)
    args = ([1], [0], [1], 1)
    found = on("triton", lambda: ops.path_conv_score(weight, x, g, *args))
    assert torch.equal(found, torch.zeros(2, 1, 3))
    assert on("triton", lambda: ops.path_conv_forward(weight, x, *args)).shape == (0, 2, 3)
    assert on("triton", lambda: ops.path_conv_backward(weight, g, [0, 1, 5], *args)).numel() == 0
