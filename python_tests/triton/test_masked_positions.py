"""Positions of packed weights in Triton's interpreter: equal to the CPU's, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paikern import ops
from python_tests.triton.helpers import both, on

pytestmark = pytest.mark.triton

# (rows, columns, panel): empty, one, odd, several words, panels below and above a word.
LAYOUTS = (
    (0, 5, 4096), (5, 0, 4096), (1, 1, 4096), (31, 33, 1), (33, 31, 16), (65, 64, 32),
    (33, 300, 64), (300, 33, 4096),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.complex128)


def packed(mask: Tensor) -> Tensor:
    """The bits, with spare bits that are set: they are nobody's."""
    bits = ops.pack_mask(mask)
    if mask.numel() % 8:
        bits[-1] |= (0xFF << mask.numel() % 8) & 0xFF
    return bits


def same(rows: int, columns: int, panel: int, density: float, *, flip: bool = True) -> None:
    mask = torch.rand(rows, columns) < density
    bits, kept = packed(mask), int(mask.sum())
    found, wanted = both(lambda: ops.list_positions(bits, kept, rows, columns, panel))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    if flip:
        moved, expected = both(lambda: ops.transpose_positions(*wanted, rows, columns, panel))
        assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))
    dense = torch.randn(rows, columns)
    for positions in (wanted[0], bits):
        where = (positions, wanted[1], rows, columns, panel, kept)
        values = on("triton", lambda w=where: ops.gather_kept(dense, *w))
        assert torch.equal(values, dense[mask])
        again = on("triton", lambda w=where, v=values: ops.scatter_kept(v, *w))
        assert torch.equal(again, torch.where(mask, dense, 0.0))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_positions_both_ways(layout: tuple[int, int, int], density: float) -> None:
    same(*layout, density)


def test_more_columns_than_16_bits() -> None:
    same(1, 66_000, 16_384, 0.1, flip=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(66_000, 2, 65_536), (140_000, 1, 4096), (2, 140_000, 4096)])
def test_more_than_16_bits_both_ways(layout: tuple[int, int, int]) -> None:
    same(*layout, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_every_type_are_moved_as_they_are(dtype: torch.dtype) -> None:
    mask = torch.rand(33, 70) < 0.3
    kept = int(mask.sum())
    positions, starts = ops.list_positions(ops.pack_mask(mask), kept, 33, 70)
    where = (positions, starts, 33, 70, 4096, kept)
    dense = torch.randn(70, 33).to(dtype).T  # not contiguous
    values = on("triton", lambda: ops.gather_kept(dense, *where))
    assert values.dtype == dtype
    assert torch.equal(values, dense[mask])
    twice = torch.stack((values, values), 1)[:, 0]  # not contiguous
    assert torch.equal(
        on("triton", lambda: ops.scatter_kept(twice, *where)), torch.where(mask, dense, 0)
    )


def test_nan_keeps_its_bits() -> None:
    bits = torch.tensor([0x7FC01234, 0x7F800001, -1], dtype=torch.int32)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    where = (torch.tensor([0, 2, 3], dtype=torch.int16), starts, 1, 5, 4096, 3)
    dense = on("triton", lambda: ops.scatter_kept(bits.view(torch.float32), *where))
    assert dense.view(torch.int32).tolist() == [[bits[0], 0, bits[1], bits[2], 0]]


def test_a_wrong_count_is_an_error() -> None:
    bits = torch.tensor([0b110101], dtype=torch.uint8)
    with pytest.raises(ValueError, match="list_positions: 4 bits are set, kept says 5"):
        on("triton", lambda: ops.list_positions(bits, 5, 2, 3))
