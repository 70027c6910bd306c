"""What a convolution with a packed weight costs, by kernel: the table behind every choice.

As in `masked_cost`, the constants are measured on a CPU with AVX-512 and two threads and used as
they are everywhere, so that every rank of a run decides alike.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from paikern.backends.dense_masked_conv import out_size
from paikern.backends.masked_cost import LANES, Estimate

# float32, two threads: 3x3 and 1x1 layers of ResNet-50 at densities 0.2, 0.05 and 0.02 and batches
# of 1, 8 and 32. An operation is "output", "input" or "kept", as the functions of the backends end.
CALL = 50e-6  # a call of the operation through Python
LIST = {"output": 0.6e-9, "input": 2.5e-9, "kept": 1.2e-9}  # a kept weight, whatever the map
VECTOR = {"output": 0.36e-9, "input": 0.36e-9, "kept": 0.32e-9}  # a kept weight times 16 outputs
ALIGNED = 0.26e-9  # the same where 16 images or whole vectors lie side by side
# As many times as long where a window steps (128 x 128, 3x3, stride 2 at 56 x 56: 1.4 to 1.6), or
# where no cache holds the maps (256 x 256, 3x3 at 56 x 56, 32 images: 1.7).
STEPPED, SPREAD, CACHED = 1.4, 1.6, 16_000_000
PIXEL = 0.4e-9  # an element of x or y, laid out in planes or taken out of them
SMALL = 100  # pixels that a map seems to have more than it has
IN_PLACE = 0.1e-9  # an element of a map that a 1x1 convolution reads or writes where it lies
DENSE_CALL = 30e-6
DENSE_FLOP = 2.6e-12  # half a multiply-add of oneDNN, in the faster of its two layouts
DENSE_WEIGHT = {"output": 0.15e-9, "input": 0.15e-9, "kept": 0.4e-9}  # a weight or its gradient
SCATTER = 0.2e-9  # a weight of the dense one that is made for a call
REORDER = 0.3e-9  # an element of contiguous maps, which oneDNN turns into its own layout
GAIN = 0.9  # of the dense time: most times are predicted within a tenth
OFFSETS = 2**31  # floats of the planes of one image that offsets reach

Shape = tuple[int, ...]


def direct_seconds(op: str, shape: Shape, kept: int) -> float:
    """One product by the direct kernel: "output", "input" or "kept"."""
    batch, _, rows, channels, high, wide, *window, out_high, out_wide = shape
    pixels, out_pixels = high * wide, out_high * out_wide
    vectors = -(-batch * out_pixels // LANES)
    maps = batch * (rows * out_pixels + channels * pixels)
    # The gradient of a 1x1 weight is taken in place from maps of whole vectors alone.
    whole = pixels % LANES == 0
    pointwise = window[:6] == [1, 1, 1, 1, 0, 0] and pixels >= 8 * LANES
    pointwise = pointwise and (whole or op != "kept")
    aligned = whole if pointwise else batch >= LANES
    element = IN_PLACE if pointwise else PIXEL * (1 + SMALL / max(1, out_pixels))
    by_vector = ALIGNED if aligned else VECTOR[op]
    if max(window[2:4]) > 1 and not pointwise:
        by_vector, element = STEPPED * by_vector, STEPPED * element
    if maps > CACHED:
        by_vector *= SPREAD
    return CALL + kept * (LIST[op] + vectors * by_vector) + maps * element


def dense_seconds(op: str, shape: Shape) -> float:
    """One product by the library's convolution on a dense weight."""
    batch, groups, rows, channels, _, _, kernel_h, kernel_w, *_, out_high, out_wide = shape
    numel = rows * channels // groups * kernel_h * kernel_w
    flops = 2 * numel * batch * out_high * out_wide
    return DENSE_CALL + flops * DENSE_FLOP + numel * DENSE_WEIGHT[op]


@functools.lru_cache(maxsize=4096)
def conv_kernel(op: str, shape: Shape, kept: int) -> str:
    """ "direct" or "dense", whichever is faster for a weight that is packed already."""
    if _too_large(shape):
        return "dense"
    batch, groups, rows, channels, high, wide, kernel_h, kernel_w, *_, out_high, out_wide = shape
    maps = batch * (rows * out_high * out_wide + channels * high * wide)
    numel = rows * channels // groups * kernel_h * kernel_w
    dense = dense_seconds(op, shape) + numel * SCATTER + maps * REORDER
    return "direct" if direct_seconds(op, shape, kept) <= dense else "dense"


def _too_large(shape: Shape) -> bool:
    groups, rows, channels, high, wide = shape[1:6]
    return 2 * max(rows, channels) // groups * high * wide >= OFFSETS


@functools.lru_cache(maxsize=4096)
def _estimate(kind: str, shape: Shape, kept: int, dtype: torch.dtype, training: bool) -> Estimate:
    if kind != "cpu":
        why = f"not yet measured on {kind}; force=True packs it for its memory"
        return Estimate("dense", None, None, why)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Estimate("dense", None, None, f"no packed kernel for {dtype}")
    products = ("output", "input", "kept") if training else ("output",)
    dense = sum(dense_seconds(op, shape) for op in products)
    direct = sum(direct_seconds(op, shape, kept) for op in products)
    columns = shape[3] // shape[1] * shape[6] * shape[7]
    density = kept / max(1, shape[2] * columns)
    times = f"{1e3 * direct:.3g} ms against {1e3 * dense:.3g} dense at density {density:.3g}"
    if direct > GAIN * dense or _too_large(shape):
        return Estimate("dense", dense, dense, f"the direct kernel would take {times}")
    return Estimate("direct", direct, dense, times)


def estimate_conv(
    device: str | torch.device,
    rows: int,
    channels: int,
    kernel: Sequence[int],
    size: Sequence[int],
    kept: int,
    batch: int,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> Estimate:
    """Which kernel a convolution with `kept` weights should run, and its time.

    Args:
        device: where the layer is; there are figures for the CPU only.
        rows, channels: of y and of x.
        kernel, stride, padding, dilation, groups: as for `masked_conv2d`, all in pairs.
        size: rows and columns of a map of x.
        batch: how many of them.
        dtype: of the weight.
        training: the gradients for x and for the weight count too.

    Returns:
        `kernel` is "direct" (kept weights one by one) or "dense" (the library's convolution:
        packing would lose).

    Example:
        >>> estimate_conv("cpu", 256, 256, (3, 3), (14, 14), 29_491, 32, padding=(1, 1)).kernel
        'direct'
        >>> estimate_conv("cpu", 256, 256, (3, 3), (14, 14), 471_859, 32, padding=(1, 1)).kernel
        'dense'
    """
    shape = (
        batch,
        groups,
        rows,
        channels,
        *size,
        *kernel,
        *stride,
        *padding,
        *dilation,
        *out_size(size, kernel, stride, padding, dilation),
    )
    return _estimate(torch.device(device).type, shape, kept, dtype, training)
