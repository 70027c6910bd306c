"""Packed masks by the CUDA sources."""

from __future__ import annotations

import pytest
import torch

from paikern import ops
from paikern.backends import registry

pytestmark = [pytest.mark.cuda_source, pytest.mark.usefixtures("cuda_source")]


@pytest.mark.parametrize("size", [0, 1, 7, 31, 33, 255, 257, 1000, 10_001])
def test_masks_equal_the_cpu_backend(size: int) -> None:
    mask = torch.rand(size) < 0.3
    with registry.using("cpu"):
        wanted = ops.pack_mask(mask)
    packed = ops.pack_mask(mask)
    assert torch.equal(packed, wanted)
    assert torch.equal(ops.unpack_mask(packed, (size,)), mask)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_apply_mask(dtype: torch.dtype) -> None:
    values = torch.randn(257, 3).to(dtype)
    values[::5] = torch.nan
    mask = torch.rand(257, 3) < 0.5
    wanted = values.masked_fill(~mask, 0)
    for given in (values.clone(), values.T.contiguous().T):
        found = ops.apply_mask_(given, ops.pack_mask(mask))
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_strided_masks() -> None:
    mask = torch.rand(40, 33) < 0.5
    assert torch.equal(ops.pack_mask(mask.T), ops.pack_mask(mask.T.contiguous()))
