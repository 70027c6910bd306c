"""masked_conv2d by way of Triton's scatter_kept and gather_kept, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from python_tests.ops.masked_conv_cases import check, make
from python_tests.ops.masked_linear_cases import DTYPES, error
from python_tests.triton.helpers import both, on

pytestmark = pytest.mark.triton

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"padding": 1},
    "strides": {"stride": (2, 1), "dilation": (1, 2)},
    "groups": {"groups": 2, "padding": (0, 2)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize("format", ["index", "bitmap"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_masked_conv2d_and_its_derivatives(name: str, format: str, dtype: torch.dtype) -> None:
    def run() -> None:
        for density, batch in ((0.3, 3), (1.0, 2)):
            case = make(8, 6, (3, 3), density, dtype, format=format, **CONVOLUTIONS[name])
            check(case, torch.randn(batch, 6, 9, 8).to(dtype), bias=batch % 2 == 0)

    on("triton", run)


def test_the_derivatives_by_name() -> None:
    case = make(8, 6, (3, 3), 0.4)
    values, where = case.packed.values.detach(), case.packed.where(transposed=True)
    conv = ([3, 3], [1, 1], [0, 0], [1, 1], 1)
    x, g = torch.randn(2, 6, 7, 5), torch.randn(2, 8, 5, 3)
    for call in (
        lambda: torch.ops.paikern.masked_conv2d_input(g, values, *where, *conv, [7, 5]),
        lambda: torch.ops.paikern.masked_conv2d_kept(g, x, *where, *conv),
    ):
        found, wanted = both(call)
        assert error(found, wanted.double()) < 1e-5


def test_masked_conv2d_of_nothing() -> None:
    for density, batch in ((0.5, 0), (0.0, 2)):
        case = make(8, 6, (3, 3), density)
        on("triton", lambda c=case, b=batch: check(c, torch.randn(b, 6, 5, 5)))
