"""Packed convolutions: the CUDA sources move the weight, the library convolves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paikern.backends import registry
from python_tests.ops.masked_conv_cases import check, make
from python_tests.ops.masked_linear_cases import DENSITIES, DTYPES

pytestmark = pytest.mark.cuda_source
LAYERS: dict[str, tuple[int, int, tuple[int, int], dict[str, Any]]] = {
    "3x3": (20, 16, (3, 3), {"padding": 1}),
    "1x1-stride2": (8, 12, (1, 1), {"stride": 2}),
    "dilated": (7, 6, (3, 2), {"dilation": (2, 3), "padding": (0, 4), "stride": (1, 2)}),
    "groups": (12, 8, (3, 3), {"padding": 1, "groups": 4}),
}


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("name", LAYERS)
def test_masked_conv2d_and_its_gradients(name: str, density: float) -> None:
    rows, channels, window, conv = LAYERS[name]
    for format in ("index", "bitmap"):
        case = make(rows, channels, window, density, format=format, panel=64, **conv)
        with registry.using("cuda_source"):
            for batch, size in ((1, (9, 8)), (3, (7, 11))):
                check(case, torch.randn(batch, channels, *size), bias=batch % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_conv2d_in_every_dtype(dtype: torch.dtype) -> None:
    case = make(9, 5, (3, 3), 0.4, dtype, padding=1)
    x = torch.randn(2, 5, 8, 9).to(dtype)
    with registry.using("cuda_source"):
        check(case, x)
        check(case, x.contiguous(memory_format=torch.channels_last))


def test_the_gradients_by_their_own_operations() -> None:
    case = make(9, 6, (3, 3), 0.4, format="bitmap", stride=2, padding=1)
    x, g = torch.randn(2, 6, 9, 8), torch.randn(2, 9, 5, 4)
    operations, values = torch.ops.paikern, case.packed.values.detach()
    found = []
    for backend in ("cuda_source", "reference"):
        with registry.using(backend):
            by_x = operations.masked_conv2d_input(g, values, *case.where(), [9, 8])
            found.append((by_x, operations.masked_conv2d_kept(g, x, *case.where())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
