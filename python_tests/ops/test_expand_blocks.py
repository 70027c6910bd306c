from __future__ import annotations

import math

import pytest
import torch

from paikern import ops
from paikern.backends import registry
from python_tests.ops.pattern_cases import unpacked
from python_tests.ops.test_block_means import CASES


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("shape", "block"), [*CASES, ((300, 999), (16, 16)), ((1025, 300), (5, 1))], ids=str
)
def test_expand_blocks_equals_indexing(
    backend: str, shape: tuple[int, ...], block: tuple[int, int]
) -> None:
    rows, columns = shape[0], math.prod(shape[1:])
    blocks = torch.rand(-(-rows // block[0]), -(-columns // block[1])) < 0.4
    with registry.using(backend):
        packed = ops.expand_blocks(ops.pack_mask(blocks), shape, block)
    (found,) = unpacked([packed], [torch.empty(shape)])
    i, j = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    assert torch.equal(found.reshape(rows, columns), blocks[i // block[0], j // block[1]])


def test_expand_blocks_by_hand() -> None:
    packed = ops.expand_blocks(torch.tensor([0b0110], dtype=torch.uint8), (3, 3), (2, 2))
    assert packed.tolist() == [0b11100100, 0]  # 001 001 110


def test_expand_blocks_of_nothing_and_errors() -> None:
    none = torch.empty(0, dtype=torch.uint8)
    assert ops.expand_blocks(none, (0, 5), (2, 2)).numel() == 0
    with pytest.raises(ValueError, match="holds 0 bits, 4 are needed"):
        ops.expand_blocks(none, (4, 4), (2, 2))
