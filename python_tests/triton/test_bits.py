"""pack_mask, unpack_mask, apply_mask_ in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from paikern import ops
from python_tests.triton.helpers import DTYPES, SIZES, both, on

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("size", [*SIZES, 511, 513])
def test_bits_equal_the_cpu_both_ways(size: int) -> None:
    mask = torch.rand(size) < 0.3
    found, wanted = both(lambda: ops.pack_mask(mask))
    assert torch.equal(found, wanted)
    assert torch.equal(on("triton", lambda: ops.unpack_mask(wanted, (size,))), mask)


def test_a_strided_mask_is_packed_row_major() -> None:
    mask = (torch.rand(9, 14) < 0.5).T[::2]
    found, wanted = both(lambda: ops.pack_mask(mask))
    assert torch.equal(found, wanted)
    assert torch.equal(on("triton", lambda: ops.unpack_mask(found, (7, 9))), mask)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_pruned_values_become_zero_nan_included(size: int, dtype: torch.dtype) -> None:
    values = torch.randn(size).to(dtype)
    values[::3] = float("nan")
    packed = ops.pack_mask(torch.rand(size) < 0.5)
    found, wanted = both(lambda: ops.apply_mask_(values.clone(), packed))
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))
    assert found.dtype == dtype


def test_a_strided_tensor_is_written_in_place() -> None:
    whole = torch.ones(6, 10)
    packed = ops.pack_mask(torch.rand(10, 3) < 0.5)
    on("triton", lambda: ops.apply_mask_(whole.T[:, ::2], packed))
    assert torch.equal(whole[::2].T, ops.unpack_mask(packed, (10, 3)).float())
    assert bool((whole[1::2] == 1).all())
