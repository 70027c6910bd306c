from __future__ import annotations

import pytest
import torch

from paikern import ops
from paikern.backends import registry


@pytest.mark.parametrize(
    "shape", [(0,), (1,), (7,), (8,), (3, 3), (31, 33), (1000,), (140_001,), ()], ids=str
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_unpack_mask_inverts_pack_mask(shape: tuple[int, ...], backend: str) -> None:
    mask = torch.rand(shape) < 0.4
    with registry.using(backend):
        assert torch.equal(ops.unpack_mask(ops.pack_mask(mask), shape), mask)


def test_unpack_mask_of_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    wanted = [bool(byte >> bit & 1) for byte in range(256) for bit in range(8)]
    assert ops.unpack_mask(packed, (256, 8)).reshape(-1).tolist() == wanted


def test_unpack_mask_reads_strided_bytes_and_spare_ones() -> None:
    packed = torch.tensor([5, 0, 255, 0, 3], dtype=torch.uint8)[::2]
    assert ops.unpack_mask(packed, (10,)).tolist() == [True, False, True] + [False] * 5 + [True] * 2


@pytest.mark.parametrize(
    ("packed", "shape", "error", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), (9,), ValueError, "holds 8 bits, 9 are needed"),
        (torch.zeros(1, dtype=torch.uint8), (-1, 2), ValueError, "sizes must be >= 0"),
        (torch.zeros(1), (3,), TypeError, "1-D uint8 tensor, got torch.float32"),
        (torch.zeros(1, 1, dtype=torch.uint8), (3,), TypeError, "with shape \\(1, 1\\)"),
    ],
)
def test_unpack_mask_errors(packed, shape, error, message: str) -> None:
    with pytest.raises(error, match=message):
        ops.unpack_mask(packed, shape)
