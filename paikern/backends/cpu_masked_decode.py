"""masked_linear by the library's product, for weights that keep much and batches that are large.

Rows of the packed weight are made dense a block at a time, in memory that stays warm; the whole
dense weight, and a dense gradient of it, never exist. Columns and packed bits serve alike.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from paikern import _C

# Elements of a block, 16 MB: at 4096 x 4096, half kept, 1024 rows of x, blocks of 2**20, 2**21,
# 2**22 and 2**24 elements took 119, 108, 106 and 104 ms, where the dense product takes 98.
BLOCK = 1 << 22

_memory = threading.local()

# values, positions or bits, whether bits, starts, rows, columns, panel
Where = tuple[int, ...]


def forward(x: Tensor, bias: Tensor | None, where: Where) -> Tensor:
    """y `[batch, rows]` of x `[batch, columns]`, all float32 and contiguous."""
    rows, columns = where[4:6]
    y = torch.empty(x.shape[0], rows, dtype=torch.float32)
    for first, block in _blocks(rows, columns):
        last = first + block.shape[0]
        _C.scatter_kept(where, 4, first, last - first, block.data_ptr())
        if bias is None:
            torch.mm(x, block.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, block.t(), out=y[:, first:last])
    return y


def by_input(g: Tensor, where: Where) -> Tensor:
    """dx `[batch, columns]` of g `[batch, rows]`."""
    rows, columns = where[4:6]
    x = torch.zeros(g.shape[0], columns, dtype=torch.float32)
    for first, block in _blocks(rows, columns):
        last = first + block.shape[0]
        _C.scatter_kept(where, 4, first, last - first, block.data_ptr())
        x.addmm_(g[:, first:last], block)
    return x


def by_kept(g: Tensor, x: Tensor, where: Where) -> None:
    """The gradient of the kept values, into the values of `where`."""
    rows, columns = where[4:6]
    for first, block in _blocks(rows, columns):
        last = first + block.shape[0]
        torch.mm(g[:, first:last].t(), x, out=block)
        _C.gather_kept(where, 4, first, last - first, block.data_ptr())


def finite(x: Tensor) -> bool:
    """Whether no NaN or infinity would meet the zeros of a block."""
    return bool(torch.isfinite(x.sum()))


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """First row and `[count, columns]` of every block, in memory kept for the next call."""
    high = max(1, min(rows, max(16, BLOCK // max(1, columns) // 16 * 16)))
    memory: Tensor | None = getattr(_memory, "block", None)
    if memory is None or memory.numel() < high * columns:
        memory = torch.empty(high * columns, dtype=torch.float32)
        if memory.numel() <= BLOCK:
            _memory.block = memory
    for first in range(0, rows, high):
        count = min(high, rows - first)
        yield first, memory[: count * columns].view(count, columns)
