"""Philox4x32-10 on the device: a function of a counter and a key (csrc/cpu/philox.h).

Words are int64 tensors of values below 2**32. A product of two of them that passes 2**63 has the
bits of the unsigned one. Source: Salmon, Moraes, Dror and Shaw, SC 2011.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(a, b, c, d, low, high):
    """The four words of a counter of four; `low` and `high` are those of the key."""
    low, high = a * 0 + low, a * 0 + high  # of 64 bits, however they were passed
    for _ in tl.static_range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a = ((right >> 32) & 0xFFFFFFFF) ^ b ^ low
        b = right & 0xFFFFFFFF
        c = ((left >> 32) & 0xFFFFFFFF) ^ d ^ high
        d = left & 0xFFFFFFFF
        low = (low + 0x9E3779B9) & 0xFFFFFFFF
        high = (high + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


@triton.jit
def choose(word, count):
    """A number below `count` and what is left of the randomness."""
    product = word * count
    return product >> 32, product & 0xFFFFFFFF


def key(seed: int) -> tuple[int, int]:
    """The low and the high word of a seed."""
    return seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
