"""What a layer with a packed weight costs, by kernel: the table behind every choice.

The constants are measured on a CPU with AVX-512 and two threads, and they are used as they are
everywhere: a choice that depended on the machine could differ between the ranks of one run.
`python -m bench.run_masked_linear --fit FILE` holds them against a results file.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch

# Seconds, float32, two threads: Xeon (Sapphire Rapids generation), 64 x 256 up to 8192 x 8192.
CALL = 11e-6  # a call through Python: 64 x 256 at one row of x
ENTRY = 0.13e-9  # a kept weight times one row of x: 0.24 ms for 1.68 million of them
BEYOND = 0.3e-9  # and more for those that no cache holds: 2.0 ms for 8.4 million
CACHED = 5_600_000  # kept weights, 6 bytes each
ALONE = 131_072  # kept weights times vectors up to which one thread works
# A kept weight times 16 rows of x out of a panel of 4096 columns: 15.8 ms for 3.36 million, 16
# times. Smaller panels lie in nearer caches: 0.9 ms for 210,000 weights of 1024 columns.
VECTOR, WIDE, NEARER = 0.31e-9, 4096, 0.15
SEVERAL = 1.15  # times as long where several panels take turns: 11,008 columns
NARROW = 0.05e-9  # and more up to 32 rows of x, a panel of 16 rows for each thread
PANEL = 0.12e-9  # an element of x put into a panel, or of y taken out of one
FAR = 0.12e-9  # and more for those behind the first two million
COLLECT = 0.6e-9  # a value brought into the order of the transposed weight
# And more for those that caches do not hold: 4 ms for 5.0 million, 40 for 20.
SCATTERED, NEARBY = 1.5e-9, 3_400_000
LIST = 0.5e-9  # an element of a weight whose bits are turned into columns for one call
DECODE = 0.4e-9  # an element of the weight written to a block and read by the product
FINITE = 0.15e-9  # an element of x or y looked at or copied on the way there
DENSE_CALL = 2e-6
DENSE_EDGE = 0.04e-9  # an element of x and y
STREAM = 0.045e-9  # an element of a dense weight beyond the two million that caches hold
STREAMED = 2_000_000
# An element of a dense gradient beyond those. 4096 x 4096 at one row of x: 5.6 ms where the
# allocator hands the same memory out again, 18 where it is new in every step. The first counts:
# packing must not lose to it.
GRADIENT = 0.15e-9
# An element of a dense weight, by rows of x, with the best of three libraries; the points between
# lie on lines of log over log.
DENSE = (
    (1, 0.036e-9),
    (4, 0.1e-9),
    (16, 0.17e-9),
    (32, 0.27e-9),
    (256, 1.5e-9),
    (1024, 5.9e-9),
    (4096, 23.6e-9),
)
LANES = 16
FEW = 2  # rows of x that go by gathers
# Half of the times are predicted within a tenth or so: the index kernels are taken where they
# should win by that, decoded rows, which take what dense takes and some more, up to a loss of 5 %.
GAIN, LOSS = 0.9, 1.05
# That a packed layer should save: caches that others have filled cost it about that. In training
# there are three calls: 64 x 256 at 1024 rows of x took 50 us more than dense, not 60 less.
LEAST, LEAST_TRAINING = 15e-6, 75e-6
BITMAP_DENSITY = 0.5  # from which PackedWeight keeps bits unless told otherwise


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


def dense_seconds(rows: int, columns: int, batch: int, *, training: bool = False) -> float:
    """One product by the fastest dense library, or all three of a training step."""
    numel = rows * columns
    each = DENSE_CALL + numel * _dense_rate(batch) + STREAM * max(0, numel - STREAMED)
    each += (rows + columns) * batch * DENSE_EDGE
    return 3 * each + GRADIENT * max(0, numel - STREAMED) if training else each


def index_seconds(
    rows: int, columns: int, kept: int, batch: int, *, bits: bool = False, training: bool = False
) -> float:
    """The same by the kernels that go over the kept weights."""
    listing = LIST * rows * columns if bits else 0.0
    if batch <= FEW:
        alone = 2 if kept <= ALONE else 1
        forward = batch * kept * ENTRY * alone + BEYOND * max(0, kept - CACHED)
    else:
        forward = _panels(rows, columns, kept, batch)
    if not training:
        return CALL + listing + forward
    # The transposed weight of bits is made anew in every call, too.
    collecting = kept * COLLECT * (2 if kept <= ALONE else 1) + SCATTERED * max(0, kept - NEARBY)
    by_input = forward + collecting + (2 * listing if bits else 0.0)
    return 3 * (CALL + listing) + forward + by_input + _panels(rows, columns, kept, batch)


def decode_seconds(rows: int, columns: int, batch: int, *, training: bool = False) -> float:
    """The same by the library on blocks of rows made dense."""
    blocks = CALL + rows * columns * DECODE + (rows + columns) * batch * FINITE
    dense = dense_seconds(rows, columns, batch, training=training)
    return dense + (3 * blocks if training else blocks)


def packed(
    rows: int, columns: int, kept: int, batch: int, *, bits: bool = False, training: bool = False
) -> tuple[str, float]:
    """Which kernel a weight that is packed already takes, "index" or "decode", and its time."""
    index = index_seconds(rows, columns, kept, batch, bits=bits, training=training)
    decode = decode_seconds(rows, columns, batch, training=training)
    return ("index", index) if index <= GAIN * decode else ("decode", decode)


@functools.lru_cache(maxsize=4096)
def cpu_kernel(rows: int, columns: int, kept: int, batch: int, bits: bool = False) -> str:
    """The kernel of `packed` for one product."""
    return packed(rows, columns, kept, batch, bits=bits)[0]


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
        dtype: of the weight. The figures are those of float32. Dense products of halves are slower
            still without matrix units (bfloat16, N = 256: 139 ms against 1.7 ms packed at 99 %);
            with them (AMX) nothing is measured.
        training: the gradients for x and for the weight count too.

    Example:
        >>> estimate("cpu", 4096, 4096, 167_772, 256).kernel
        'index'
        >>> estimate("cpu", 4096, 4096, 8_388_608, 256).kernel
        'dense'
    """
    kind = torch.device(device).type
    if kind != "cpu":
        why = f"not yet measured on {kind}; force=True packs it for its memory"
        return Estimate("dense", None, None, why)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Estimate("dense", None, None, f"no packed kernel for {dtype}")
    dense = dense_seconds(rows, columns, batch, training=training)
    density = kept / max(1, rows * columns)
    kernel, seconds = packed(
        rows, columns, kept, batch, bits=density > BITMAP_DENSITY, training=training
    )
    times = f"{1e3 * seconds:.3g} ms against {1e3 * dense:.3g} dense at density {density:.3g}"
    least = LEAST_TRAINING if training else LEAST
    limit = min(GAIN * dense, dense - least) if kernel == "index" else LOSS * dense
    if seconds > limit:
        return Estimate("dense", dense, dense, f"{kernel} would take {times}")
    return Estimate(kernel, seconds, dense, times)


def _panels(rows: int, columns: int, kept: int, batch: int) -> float:
    vectors = -(-batch // LANES)
    each = VECTOR * (min(max(columns, 1), WIDE) / WIDE) ** NEARER + (NARROW if vectors <= 2 else 0)
    each *= SEVERAL if columns > WIDE else 1
    moved = (rows + columns) * vectors * LANES
    time = kept * vectors * each + moved * PANEL + max(0, moved - STREAMED) * FAR
    return 2 * time if kept * vectors <= ALONE else time


def _dense_rate(batch: int) -> float:
    """Between the points of DENSE, and in proportion to the batch behind the last one."""
    if batch <= DENSE[0][0]:
        return DENSE[0][1]
    for (low, a), (high, b) in itertools.pairwise(DENSE):
        if batch <= high:
            at = math.log(batch / low) / math.log(high / low)
            return a * (b / a) ** at
    return DENSE[-1][1] * batch / DENSE[-1][0]
