"""How large the tiles are and how kernels are launched: one table, no autotuning.

Sizes are powers of two. The row "interpreter" is small, so that tensors of a few hundred elements
meet every border between tiles, chunks and partial sums. Speed on a GPU is not yet measured: the
other rows follow from registers and loads in flight a thread.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Flat(NamedTuple):
    """Tiles over row-major elements: `rows` lines of eight, one byte of a mask each."""

    rows: int
    warps: int


class Select(NamedTuple):
    """A program of a selection reads `tiles` tiles of `rows` lines of eight."""

    rows: int
    tiles: int
    warps: int


class Sweep(NamedTuple):
    """Tiles [rows, columns] of a weight, at most `steps` of them a program."""

    rows: int
    columns: int
    steps: int
    warps: int


class Product(NamedTuple):
    """Tiles of a product: output rows, positions, and what is added up at a time."""

    rows: int
    positions: int
    depth: int
    warps: int


class Walk(NamedTuple):
    """Lanes of a program, each with steps of its own: few, to be spread over the device.

    Two warps of 32, as ptxas spills registers to make room for more blocks of one.
    """

    lanes: int
    warps: int


class Packed(NamedTuple):
    """Packed weights entry by entry, and the words that say where the entries are.

    A program has `words` of 32 weights and looks into `tile` of them at once; or `rows` rows with
    `lanes` entries of each; or `entries` entries with `batch` rows of x.
    """

    words: int
    tile: int
    rows: int
    lanes: int
    lines: int
    entries: int
    batch: int
    warps: int


class Decode(NamedTuple):
    """Tiles [rows, columns] of a packed weight made dense on chip, for `batch` rows of x at once.

    Where that gives fewer than `programs`, sums are cut into parts.
    """

    rows: int
    columns: int
    batch: int
    programs: int
    warps: int


class Config(NamedTuple):
    flat: Flat
    pattern: Flat  # with 64-bit positions an element
    select: Select
    forward: Sweep
    adjoint: Sweep
    product: Product  # maps of many positions
    product_few: Product  # maps of at most 16
    walk: Walk
    packed: Packed
    decode: Decode
    decode_few: Decode  # batches of at most 16


_TABLE = {
    "cuda": Config(
        flat=Flat(256, 4),
        pattern=Flat(64, 4),
        select=Select(512, 32, 8),
        forward=Sweep(4, 1024, 8, 8),
        adjoint=Sweep(4, 1024, 64, 8),
        product=Product(32, 64, 16, 8),
        product_few=Product(32, 16, 16, 4),
        walk=Walk(64, 2),
        packed=Packed(256, 32, 4, 128, 1, 16, 64, 4),
        decode=Decode(64, 64, 64, 256, 8),
        decode_few=Decode(32, 64, 16, 256, 4),
    ),
    "hip": Config(
        flat=Flat(256, 4),
        pattern=Flat(64, 4),
        select=Select(512, 32, 8),
        forward=Sweep(4, 1024, 8, 8),
        adjoint=Sweep(4, 1024, 64, 8),
        product=Product(32, 32, 16, 4),
        product_few=Product(32, 16, 16, 4),
        walk=Walk(64, 1),
        packed=Packed(256, 32, 4, 128, 1, 16, 64, 4),
        decode=Decode(64, 64, 64, 256, 4),
        decode_few=Decode(32, 64, 16, 256, 4),
    ),
    "interpreter": Config(
        flat=Flat(64, 1),
        pattern=Flat(64, 1),
        select=Select(64, 2, 1),
        forward=Sweep(8, 64, 2, 1),
        adjoint=Sweep(8, 64, 2, 1),
        product=Product(16, 64, 16, 1),
        product_few=Product(16, 16, 16, 1),
        walk=Walk(64, 1),
        packed=Packed(256, 128, 32, 64, 16, 128, 32, 1),
        decode=Decode(32, 32, 32, 16, 1),
        decode_few=Decode(32, 32, 16, 16, 1),
    ),
}


@functools.cache
def device_row() -> str:
    """Which row of the table is in use."""
    if interpreting():
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def config() -> Config:
    return _TABLE[device_row()]


def table(row: str) -> Config:
    return _TABLE[row]


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter; decided when triton was imported."""
    return not isinstance(_probe, triton.JITFunction)


@triton.jit
def _probe(x):  # type: ignore[no-untyped-def]
    pass


def stored(dtype: torch.dtype) -> torch.dtype:
    """What kernels store for results of a dtype: the interpreter cuts bfloat16 off."""
    return torch.float32 if interpreting() and dtype == torch.bfloat16 else dtype


def multiplied(operand: Tensor) -> Tensor:
    """An operand of `tl.dot`: the interpreter multiplies the bits of bfloat16 as integers."""
    return operand.to(stored(operand.dtype))


def launch(
    kernel: Any,
    grid: Sequence[int],
    like: Tensor,
    *args: Any,
    warps: int,
    fused: bool = False,
    **constants: Any,
) -> None:
    """Run a kernel on the device and the current stream of `like`, if there is anything to do.

    Products and sums are contracted only where `fused`: counting and emitting recompute the same
    scores.
    """
    if 0 in grid:
        return
    where = torch.cuda.device_of(like) if like.is_cuda else contextlib.nullcontext()
    with where:
        kernel[tuple(grid)](*args, **constants, num_warps=warps, enable_fp_fusion=fused)


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)
