from __future__ import annotations

import numpy as np
import pytest
import torch

from paikern import ops
from paikern.backends import registry

SIZES = (0, 1, 7, 8, 9, 31, 33, 63, 65, 1000, 140_001)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pack_mask_equals_numpy(size: int, density: float, backend: str) -> None:
    mask = torch.rand(size) < density
    wanted = torch.from_numpy(np.packbits(mask.numpy(), bitorder="little"))
    with registry.using(backend):
        assert torch.equal(ops.pack_mask(mask), wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pack_mask_reads_row_major_whatever_the_strides(backend: str) -> None:
    mask = torch.rand(33, 5, 7) < 0.5
    views = (mask.permute(2, 0, 1), mask[::2, 1:], mask[:, :1].expand(-1, 4, -1), mask[0, 0, 0])
    with registry.using(backend):
        for view in views:
            flat = view.contiguous().reshape(-1).numpy()
            assert ops.pack_mask(view).numpy().tolist() == (
                np.packbits(flat, bitorder="little").tolist()
            )


def test_pack_mask_by_hand() -> None:
    mask = torch.tensor([[True, False, False], [False, True, False], [False, False, True]])
    assert ops.pack_mask(mask).tolist() == [0b00010001, 0b1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_pack_mask_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"must be a bool tensor, got {dtype}"):
        ops.pack_mask(torch.ones(3, dtype=dtype))
