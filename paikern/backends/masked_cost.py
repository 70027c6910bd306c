"""What a layer with a packed weight costs, by kernel: the table behind every choice.

The constants are measured on a CPU with AVX-512 and two threads, and they are used as they are
everywhere: a choice that depended on the machine could differ between the ranks of one run.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# 4096 x 4096, float32, two threads (python -m bench.run_masked_linear).
CALL = 15e-6  # a call of the operation through Python
ENTRY = 0.18e-9  # a kept weight times one row of x, by gathers
VECTOR = 0.30e-9  # a kept weight times 16 rows of x in a panel
PANEL = 0.25e-9  # an element of x put into a panel, or of y taken out of one
DECODE = 0.10e-9  # an element of a dense block of rows written from the packed weight
DENSE_CALL = 8e-6
DENSE_BYTE = 0.025e-9  # a byte of the weight through a matrix-vector product
DENSE_FLOP = 2.2e-12  # half a multiply-add of the best library at 32 rows of x or more
LANES = 16
FEW = 2  # rows of x that go by gathers
LOSS = 1.05  # what a packed weight may take, dense being 1


class Estimate(NamedTuple):
    """What runs and why.

    Attributes:
        kernel: "index" (kept weights one by one), "decode" (blocks of rows made dense for the
            library's product) or "dense" (the library alone: packing would lose).
        seconds: of that kernel, None where nothing is measured.
        dense_seconds: of the library's product with a dense weight, None likewise.
        why: one sentence.
    """

    kernel: str
    seconds: float | None
    dense_seconds: float | None
    why: str


def index_seconds(rows: int, columns: int, kept: int, batch: int) -> float:
    """One product by the index kernel."""
    if batch <= FEW:
        return CALL + kept * batch * ENTRY
    vectors = -(-batch // LANES)
    return CALL + kept * vectors * VECTOR + (rows + columns) * vectors * LANES * PANEL


def dense_seconds(rows: int, columns: int, batch: int) -> float:
    """One product by the fastest dense library."""
    numel = rows * columns
    return DENSE_CALL + max(4 * numel * DENSE_BYTE, 2 * numel * batch * DENSE_FLOP)


def decode_seconds(rows: int, columns: int, batch: int) -> float:
    """One product by the library on blocks of rows made dense."""
    return CALL + dense_seconds(rows, columns, batch) + rows * columns * DECODE


def packed_seconds(rows: int, columns: int, kept: int, batch: int) -> float:
    """One product with a packed weight, by the faster kernel."""
    return min(index_seconds(rows, columns, kept, batch), decode_seconds(rows, columns, batch))


@functools.lru_cache(maxsize=4096)
def cpu_kernel(rows: int, columns: int, kept: int, batch: int) -> str:
    """ "index" or "decode", whichever is faster for a weight that is packed already."""
    index = index_seconds(rows, columns, kept, batch)
    return "index" if index <= decode_seconds(rows, columns, batch) else "decode"


@functools.lru_cache(maxsize=4096)
def estimate(
    device: str | torch.device,
    rows: int,
    columns: int,
    kept: int,
    batch: int,
    *,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> Estimate:
    """Which kernel a linear layer `[rows, columns]` with `kept` weights should run, and its time.

    Args:
        device: where the layer is; there are figures for the CPU only.
        batch: rows of x, all leading axes together.
        dtype: of the weight.
        training: the gradients for x and for the weight count too.

    Example:
        >>> estimate("cpu", 4096, 4096, 167_772, 256).kernel
        'index'
        >>> estimate("cpu", 4096, 4096, 8_388_608, 256).kernel
        'dense'
    """
    kind = torch.device(device).type
    if kind != "cpu":
        return Estimate("index", None, None, f"not yet measured on {kind}: packed for its memory")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Estimate("dense", None, None, f"no packed kernel for {dtype}")
    products = 3 if training else 1
    dense = products * dense_seconds(rows, columns, batch)
    index = products * index_seconds(rows, columns, kept, batch)
    decode = products * decode_seconds(rows, columns, batch)
    kernel, seconds = ("index", index) if index <= decode else ("decode", decode)
    density = kept / max(1, rows * columns)
    times = f"{1e3 * seconds:.3g} ms against {1e3 * dense:.3g} dense at density {density:.3g}"
    if seconds > LOSS * dense:
        return Estimate("dense", dense, dense, f"{kernel} would take {times}")
    return Estimate(kernel, seconds, dense, times)
