"""Batched linear layers and convolutions: V x, V^T g, and scores V * (g^T x).

    V = |W|**p * M, W [groups * O, C, *kernel]
    maps x [N, groups * C, *size] and g [N, groups * O, *out]
    forward:  z[n, o, q] = sum_{c, t} V[o, c, t] * x[n, c, q * stride + t * dilation - padding]
    adjoint:  its transpose; positions of one stride phase see the same taps and are one grid
    score:    V[o, c, t] * sum_{n, q} g[n, o, q] * x[n, c, q * stride + t * dilation - padding]

Up to three axes; fewer are filled up with ones in front. A batch of vectors is a convolution of one
axis, kernel 1, its maps transposed by strides. Each program multiplies a tile [rows, depth] of V,
made from the weight and its bits as it is read, by a tile [depth, positions], tap after tap: every
output adds the same products in the same order. float32 without rounding of operands (no tf32).

Bytes moved: the weight once for every block of positions, the maps once for every block of rows
and every tap, most of it out of the caches. Limit: float32 multiply-adds, and for maps of few
positions the reads of the weight.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from paikern.backends.triton.config import Product, blocks, config, launch
from paikern.backends.triton.sweeps import as_float, as_mask, as_weight, backward, forward
from paikern.backends.triton.tiles import bit_at, kept_values
from paikern.errors import BackendError

# Where the axes lie in the table of integers that describes a product.
IN = tl.constexpr(0)
OUT = tl.constexpr(3)
KERNEL = tl.constexpr(6)
STRIDE = tl.constexpr(9)
PADDING = tl.constexpr(12)
DILATION = tl.constexpr(15)
GROUP_ROWS = tl.constexpr(18)
CHANNELS = tl.constexpr(19)
BATCH = tl.constexpr(20)
X_BATCH = tl.constexpr(21)  # strides of the two maps: batch, channel, position
X_CHANNEL = tl.constexpr(22)
X_POSITION = tl.constexpr(23)
G_BATCH = tl.constexpr(24)
G_CHANNEL = tl.constexpr(25)
G_POSITION = tl.constexpr(26)


@triton.jit
def axes(table, FIRST: tl.constexpr):
    """The three integers at FIRST, 32-bit: a channel's map and a kernel are smaller than 2**31."""
    first, second = tl.load(table + FIRST).to(tl.int32), tl.load(table + FIRST + 1).to(tl.int32)
    return first, second, tl.load(table + FIRST + 2).to(tl.int32)


@triton.jit
def product_forward_kernel(
    weight,
    mask,
    x,
    out,
    table,
    POWER: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid: blocks of positions * batch * groups, blocks of a group's rows."""
    rows, channels = tl.load(table + GROUP_ROWS), tl.load(table + CHANNELS)
    n0, n1, n2 = axes(table, IN)
    o0, o1, o2 = axes(table, OUT)
    k0, k1, k2 = axes(table, KERNEL)
    s0, s1, s2 = axes(table, STRIDE)
    p0, p1, p2 = axes(table, PADDING)
    d0, d1, d2 = axes(table, DILATION)
    batch, places, taps = tl.load(table + BATCH), o0 * o1 * o2, k0 * k1 * k2
    x_channel, x_position = tl.load(table + X_CHANNEL), tl.load(table + X_POSITION)
    across = tl.cdiv(places, POSITIONS)
    sample = tl.program_id(0) // across % batch
    group = tl.program_id(0) // across // batch
    position = tl.program_id(0) % across * POSITIONS + tl.arange(0, POSITIONS)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = position < places
    first0 = position // (o1 * o2) * s0 - p0
    first1 = position // o2 % o1 * s1 - p1
    first2 = position % o2 * s2 - p2
    first_x = x + sample * tl.load(table + X_BATCH)
    total = tl.zeros([ROWS, POSITIONS], dtype=tl.float32)
    for tap in range(taps):
        i0 = first0 + tap // (k1 * k2) * d0
        i1 = first1 + tap // k2 % k1 * d1
        i2 = first2 + tap % k2 * d2
        inside = there & (i0 >= 0) & (i0 < n0) & (i1 >= 0) & (i1 < n1) & (i2 >= 0) & (i2 < n2)
        at = ((i0 * n1 + i1) * n2 + i2) * x_position
        for block in range(tl.cdiv(channels, DEPTH)):
            channel = block * DEPTH + tl.arange(0, DEPTH)
            known = channel < channels
            index = ((group * rows + row)[:, None] * channels + channel[None, :]) * taps + tap
            values = kept_values(
                weight, mask, index, (row < rows)[:, None] & known[None, :], POWER, MASKED
            )
            entries = tl.load(
                first_x + ((group * channels + channel) * x_channel)[:, None] + at[None, :],
                mask=known[:, None] & inside[None, :],
                other=0.0,
            )
            total = tl.dot(values, entries, total, input_precision="ieee")
    line = (group * rows + row) * tl.load(table + G_CHANNEL)
    to = out + sample * tl.load(table + G_BATCH) + line[:, None]
    tl.store(
        to + (position * tl.load(table + G_POSITION))[None, :],
        total,
        mask=(row < rows)[:, None] & there[None, :],
    )


@triton.jit
def product_adjoint_kernel(
    weight,
    mask,
    g,
    out,
    table,
    POWER: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid: phases * blocks of a phase's positions * batch * groups, blocks of channels."""
    rows, channels = tl.load(table + GROUP_ROWS), tl.load(table + CHANNELS)
    n0, n1, n2 = axes(table, IN)
    o0, o1, o2 = axes(table, OUT)
    k0, k1, k2 = axes(table, KERNEL)
    s0, s1, s2 = axes(table, STRIDE)
    p0, p1, p2 = axes(table, PADDING)
    d0, d1, d2 = axes(table, DILATION)
    batch, taps = tl.load(table + BATCH), k0 * k1 * k2
    g_channel, g_position = tl.load(table + G_CHANNEL), tl.load(table + G_POSITION)
    # Positions of a phase, row-major in a box of ceil(size / stride).
    b1, b2 = tl.cdiv(n1, s1), tl.cdiv(n2, s2)
    across = tl.cdiv(tl.cdiv(n0, s0) * b1 * b2, POSITIONS)
    phase = tl.program_id(0) % (s0 * s1 * s2)
    rest = tl.program_id(0) // (s0 * s1 * s2)
    sample, group = rest // across % batch, rest // across // batch
    position = rest % across * POSITIONS + tl.arange(0, POSITIONS)
    f0, f1, f2 = phase // (s1 * s2), phase // s2 % s1, phase % s2
    i0 = position // (b1 * b2) * s0 + f0
    i1 = position // b2 % b1 * s1 + f1
    i2 = position % b2 * s2 + f2
    there = (i0 < n0) & (i1 < n1) & (i2 < n2)
    channel = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_g = g + sample * tl.load(table + G_BATCH)
    total = tl.zeros([ROWS, POSITIONS], dtype=tl.float32)
    for tap in range(taps):
        shift0 = p0 - tap // (k1 * k2) * d0
        shift1 = p1 - tap // k2 % k1 * d1
        shift2 = p2 - tap % k2 * d2
        # A tap of another phase reaches none of these positions.
        hits = ((f0 + shift0) % s0 == 0) & ((f1 + shift1) % s1 == 0)
        if hits & ((f2 + shift2) % s2 == 0):
            at0, at1, at2 = i0 + shift0, i1 + shift1, i2 + shift2
            inside = there & (at0 >= 0) & (at1 >= 0) & (at2 >= 0)
            q0, q1, q2 = at0 // s0, at1 // s1, at2 // s2
            inside = inside & (q0 < o0) & (q1 < o1) & (q2 < o2)
            at = ((q0 * o1 + q1) * o2 + q2) * g_position
            for block in range(tl.cdiv(rows, DEPTH)):
                row = block * DEPTH + tl.arange(0, DEPTH)
                known = row < rows
                index = ((group * rows + row)[None, :] * channels + channel[:, None]) * taps + tap
                values = kept_values(
                    weight,
                    mask,
                    index,
                    (channel < channels)[:, None] & known[None, :],
                    POWER,
                    MASKED,
                )
                entries = tl.load(
                    first_g + ((group * rows + row) * g_channel)[:, None] + at[None, :],
                    mask=known[:, None] & inside[None, :],
                    other=0.0,
                )
                total = tl.dot(values, entries, total, input_precision="ieee")
    line = (group * channels + channel) * tl.load(table + X_CHANNEL)
    to = out + sample * tl.load(table + X_BATCH) + line[:, None]
    flat = (i0 * n1 + i1) * n2 + i2
    tl.store(
        to + (flat * tl.load(table + X_POSITION))[None, :],
        total,
        mask=(channel < channels)[:, None] & there[None, :],
    )


@triton.jit
def product_score_kernel(
    weight,
    mask,
    x,
    g,
    out,
    table,
    pruned,
    POWER: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid: blocks of a group's rows times blocks of channels, taps, groups. DEPTH: positions."""
    rows, channels = tl.load(table + GROUP_ROWS), tl.load(table + CHANNELS)
    n0, n1, n2 = axes(table, IN)
    o0, o1, o2 = axes(table, OUT)
    k0, k1, k2 = axes(table, KERNEL)
    s0, s1, s2 = axes(table, STRIDE)
    p0, p1, p2 = axes(table, PADDING)
    d0, d1, d2 = axes(table, DILATION)
    places, taps = o0 * o1 * o2, k0 * k1 * k2
    x_position, g_position = tl.load(table + X_POSITION), tl.load(table + G_POSITION)
    group, tap = tl.program_id(2), tl.program_id(1)
    across = tl.cdiv(channels, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    shift0 = tap // (k1 * k2) * d0 - p0
    shift1 = tap // k2 % k1 * d1 - p1
    shift2 = tap % k2 * d2 - p2
    g_line = (group * rows + row) * tl.load(table + G_CHANNEL)
    x_line = (group * channels + channel) * tl.load(table + X_CHANNEL)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for sample in range(tl.load(table + BATCH)):
        first_g = g + sample * tl.load(table + G_BATCH)
        first_x = x + sample * tl.load(table + X_BATCH)
        for block in range(tl.cdiv(places, DEPTH)):
            position = block * DEPTH + tl.arange(0, DEPTH)
            there = position < places
            i0 = position // (o1 * o2) * s0 + shift0
            i1 = position // o2 % o1 * s1 + shift1
            i2 = position % o2 * s2 + shift2
            inside = there & (i0 >= 0) & (i0 < n0) & (i1 >= 0) & (i1 < n1) & (i2 >= 0) & (i2 < n2)
            at = ((i0 * n1 + i1) * n2 + i2) * x_position
            left = tl.load(
                first_g + g_line[:, None] + (position * g_position)[None, :],
                mask=(row < rows)[:, None] & there[None, :],
                other=0.0,
            )
            right = tl.load(
                first_x + at[:, None] + x_line[None, :],
                mask=inside[:, None] & (channel < channels)[None, :],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    index = ((group * rows + row)[:, None] * channels + channel[None, :]) * taps + tap
    score = kept_values(weight, mask, index, inside, POWER, MASKED) * total
    if MASKED:
        score = tl.where(bit_at(mask, index, inside), score, pruned)
    tl.store(out + index, score, mask=inside)


def _three(values: Sequence[int], fill: int) -> list[int]:
    return [fill] * (3 - len(values)) + list(values)


class _Geometry:
    """The integers of a product, on the host and as a table on the device."""

    def __init__(
        self,
        weight: Sequence[int],
        size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        kernel = weight[2:]
        out = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size[2:], kernel, stride, padding, dilation, strict=True)
        ]
        self.batch, self.groups = size[0], groups
        self.rows, self.channels = weight[0] // groups, weight[1]
        self.size, self.out = _three(size[2:], 1), _three(out, 1)
        self.kernel, self.stride = _three(kernel, 1), _three(stride, 1)
        self.rest = [*_three(padding, 0), *_three(dilation, 1)]
        pixels, places = _product(self.size), _product(self.out)
        if max(pixels, places, _product(self.kernel)) >= 2**30:
            raise BackendError(
                f"the triton backend takes maps of fewer than 2**30 positions, got {tuple(size)}; "
                "use backend='reference'"
            )
        wide, high = groups * self.channels, groups * self.rows
        self.layout = [wide * pixels, pixels, 1, high * places, places, 1]
        self.result = (size[0], weight[0], *out)

    def table(self, device: torch.device) -> Tensor:
        values = [
            *self.size, *self.out, *self.kernel, *self.stride, *self.rest, self.rows,
            self.channels, self.batch, *self.layout,
        ]  # fmt: skip
        return torch.tensor(values, dtype=torch.int64, device=device)


def _linear(weight: Tensor, batch: int) -> _Geometry:
    """A batch of vectors as the positions of one map, [batch, features] in memory."""
    rows, columns = weight.shape
    geometry = _Geometry((rows, columns, 1), (1, columns, batch), (1,), (0,), (1,), 1)
    geometry.layout = [0, 1, columns, 0, 1, rows]
    return geometry


def _product(values: Sequence[int]) -> int:
    return values[0] * values[1] * values[2]


def _tile(positions: int) -> Product:
    return config().product_few if positions <= 16 else config().product


def _forward(
    geometry: _Geometry, weight: Tensor, x: Tensor, power: int, mask: Tensor | None, z: Tensor
) -> Tensor:
    if z.numel() == 0 or x.numel() == 0:
        return z.zero_()
    positions = _product(geometry.out)
    tile = _tile(positions)
    held = as_weight(weight, power)
    grid = (
        blocks(positions, tile.positions) * geometry.batch * geometry.groups,
        blocks(geometry.rows, tile.rows),
    )
    launch(
        product_forward_kernel, grid, held, held, as_mask(mask, held), as_float(x), z,
        geometry.table(z.device), POWER=power, MASKED=mask is not None, ROWS=tile.rows,
        POSITIONS=tile.positions, DEPTH=tile.depth, warps=tile.warps,
    )  # fmt: skip
    return z


def _backward(
    geometry: _Geometry, weight: Tensor, g: Tensor, power: int, mask: Tensor | None, x: Tensor
) -> Tensor:
    if x.numel() == 0 or g.numel() == 0:
        return x.zero_()
    box = [blocks(n, s) for n, s in zip(geometry.size, geometry.stride, strict=True)]
    tile = _tile(_product(box))
    held = as_weight(weight, power)
    phases = _product(geometry.stride)
    grid = (
        blocks(_product(box), tile.positions) * phases * geometry.batch * geometry.groups,
        blocks(geometry.channels, tile.rows),
    )
    launch(
        product_adjoint_kernel, grid, held, held, as_mask(mask, held), as_float(g), x,
        geometry.table(x.device), POWER=power, MASKED=mask is not None, ROWS=tile.rows,
        POSITIONS=tile.positions, DEPTH=tile.depth, warps=tile.warps,
    )  # fmt: skip
    return x


def _score(
    geometry: _Geometry,
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    power: int,
    mask: Tensor | None,
    pruned: float,
) -> Tensor:
    score = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    tile = config().product
    depth = 16 if _product(geometry.out) <= 16 else tile.depth
    held = as_weight(weight, power)
    grid = (
        blocks(geometry.rows, tile.rows) * blocks(geometry.channels, tile.rows),
        _product(geometry.kernel),
        geometry.groups,
    )
    launch(
        product_score_kernel, grid if score.numel() else (0,), held, held, as_mask(mask, held),
        as_float(x), as_float(g), score, geometry.table(score.device), float(pruned), POWER=power,
        MASKED=mask is not None, ROWS=tile.rows, COLUMNS=tile.rows, DEPTH=depth,
        warps=tile.warps,
    )  # fmt: skip
    return score


def path_forward(weight: Tensor, x: Tensor, power: int, mask: Tensor | None) -> Tensor:
    if x.dim() == 1:
        return forward(weight, x, power, mask)
    z = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    return _forward(_linear(weight, x.shape[0]), weight, x, power, mask, z)


def path_backward(weight: Tensor, g: Tensor, power: int, mask: Tensor | None) -> Tensor:
    if g.dim() == 1:
        return backward(weight, g, power, mask)
    x = g.new_empty((g.shape[0], weight.shape[1]), dtype=torch.float32)
    return _backward(_linear(weight, g.shape[0]), weight, g, power, mask, x)


def path_score(
    weight: Tensor, x: Tensor, g: Tensor, power: int, mask: Tensor | None, pruned: float
) -> Tensor:
    batch = 1 if x.dim() == 1 else x.shape[0]
    return _score(_linear(weight, batch), weight, x, g, power, mask, pruned)


def path_conv_forward(
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    geometry = _Geometry(weight.shape, x.shape, stride, padding, dilation, groups)
    z = x.new_empty(geometry.result, dtype=torch.float32)
    return _forward(geometry, weight, x, power, mask, z)


def path_conv_backward(
    weight: Tensor,
    g: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    geometry = _Geometry(weight.shape, input_size, stride, padding, dilation, groups)
    x = g.new_empty(tuple(input_size), dtype=torch.float32)
    return _backward(geometry, weight, g, power, mask, x)


def path_conv_score(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
    pruned: float,
) -> Tensor:
    geometry = _Geometry(weight.shape, x.shape, stride, padding, dilation, groups)
    return _score(geometry, weight, x, g, power, mask, pruned)
