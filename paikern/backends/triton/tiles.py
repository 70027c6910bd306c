"""What kernels share on the device: tiles [rows, 8] of elements, one byte of a mask a row.

A tile covers `8 * rows` elements in row-major order; bits are packed by shifted sums along the
second axis. Reads of a whole tile carry no mask, so that they become 16-byte loads.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit
def lines(ROWS: tl.constexpr):
    """Positions [ROWS, 8] within a tile."""
    return tl.arange(0, ROWS)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def packed(bits):
    """bool [ROWS, 8] -> bytes [ROWS], the first bit lowest."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 8)[None, :], 1).to(tl.uint8)


@triton.jit
def unpacked(mask, start, left, ROWS: tl.constexpr):
    """bool [ROWS, 8]: the bits of elements start .. start + left, start a multiple of eight."""
    byte = tl.arange(0, ROWS)
    word = tl.load(mask + start // 8 + byte, mask=byte * 8 < left, other=0).to(tl.int32)
    return ((word[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def bit_at(mask, index, inside):
    """bool: the bits of elements at any positions."""
    word = tl.load(mask + (index >> 3), mask=inside, other=0).to(tl.int32)
    return ((word >> (index & 7).to(tl.int32)) & 1) != 0


@triton.jit
def widen(values):
    """float32, exactly; the interpreter's own conversion of bfloat16 loses subnormals."""
    if values.dtype == tl.bfloat16:
        word = values.to(tl.int16, bitcast=True).to(tl.int32) << 16
        wide = word.to(tl.float32, bitcast=True)
    else:
        wide = values.to(tl.float32)
    return wide


@triton.jit
def _read(address, start, local, left, full, TYPE: tl.constexpr):
    first = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16) + start
    if full:
        values = tl.load(first + local)
    else:
        values = tl.load(first + local, mask=local < left, other=0.0)
    return widen(values)


@triton.jit
def read_any(address, code, start, local, left, full):
    """float32 values of a tile at an address, 16-byte aligned, of a type known only here."""
    if code == FLOAT32:
        values = _read(address, start, local, left, full, tl.float32)
    elif code == BFLOAT16:
        values = _read(address, start, local, left, full, tl.bfloat16)
    else:
        values = _read(address, start, local, left, full, tl.float16)
    return values


@triton.jit
def magnitude(w, POWER: tl.constexpr):
    """|w|**POWER in float32, POWER 1 or 2."""
    w = tl.abs(widen(w))
    if POWER == 2:
        w = w * w
    return w


@triton.jit
def factored(w, a, g, POWER: tl.constexpr):
    """`((|w|**p) * a) * g`, in this order of products everywhere."""
    return (magnitude(w, POWER) * a) * g


@triton.jit
def kept_values(weight, mask, index, inside, POWER: tl.constexpr, MASKED: tl.constexpr):
    """|w|**POWER under the mask, 0 elsewhere, a NaN there too; power 0 reads no weight."""
    if POWER == 0:
        values = tl.where(inside, 1.0, 0.0)
    else:
        values = magnitude(tl.load(weight + index, mask=inside, other=0.0), POWER)
    if MASKED:
        values = tl.where(bit_at(mask, index, inside), values, 0.0)
    return values
