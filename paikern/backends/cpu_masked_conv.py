"""masked_conv2d on the CPU: csrc/cpu/masked_conv.h, or oneDNN where that is faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _C
from paikern.backends.cpu_masked_linear import (
    gather_kept,
    listed,
    masked_linear,
    masked_linear_input,
    masked_linear_kept,
    scatter_kept,
)
from paikern.backends.cpu_masked_linear import transpose_positions as transpose
from paikern.backends.dense_masked_conv import format_of, operations, out_size
from paikern.backends.masked_arguments import (
    check_bias,
    check_maps,
    check_transposed,
    check_values,
    check_where,
    refuse_dtype,
)
from paikern.backends.masked_conv_cost import conv_kernel

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_dense = operations(scatter_kept, gather_kept)


def masked_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    starts: Tensor,
    t_positions: Tensor | None,
    t_starts: Tensor | None,
    t_source: Tensor | None,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    conv = (kernel, stride, padding, dilation, groups)
    check_values("masked_conv2d", values, positions, starts, rows, columns, panel, kept)
    check_maps("masked_conv2d", {"x": x}, x.shape[2:], rows, columns, *conv)
    check_bias("masked_conv2d", bias, rows)
    shape = _shape(rows, columns, x.shape[0], tuple(x.shape[2:]), *conv)
    if _is_linear(shape, x):
        back = (t_positions, t_starts, t_source)
        where = (positions, starts, *back, rows, columns, panel, kept)
        return _as_maps(masked_linear(_pixels(x), values, bias, *where), x)
    if conv_kernel("output", shape, kept) == "dense":
        where = (positions, starts, None, None, None, rows, columns, panel, kept)
        add = None if bias is None else bias.float()
        return _dense.output(x.float(), values.float(), add, *where, *conv).to(x.dtype)
    positions = listed(positions, rows, columns, panel, kept)
    maps, wide = x.contiguous(), values.float().contiguous()
    add = None if bias is None else bias.float().contiguous()
    y = torch.empty((x.shape[0], rows, *shape[-2:]), dtype=torch.float32)
    _C.masked_conv2d(
        shape,
        (wide.data_ptr(), 0, positions.data_ptr(), starts.data_ptr(), rows, columns, panel),
        _map(maps),
        0 if add is None else add.data_ptr(),
        y.data_ptr(),
    )
    return y.to(x.dtype, memory_format=format_of(x))


def masked_conv2d_input(
    g: Tensor,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    t_positions: Tensor | None,
    t_starts: Tensor | None,
    t_source: Tensor | None,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    size: Sequence[int],
) -> Tensor:
    conv = (kernel, stride, padding, dilation, groups)
    check_values("masked_conv2d_input", values, positions, starts, rows, columns, panel, kept)
    check_maps("masked_conv2d_input", {"g": g}, size, rows, columns, *conv)
    shape = _shape(rows, columns, g.shape[0], tuple(size), *conv)
    if _is_linear(shape, g):
        back = (t_positions, t_starts, t_source)
        where = (positions, starts, *back, rows, columns, panel, kept)
        return _as_maps(masked_linear_input(_pixels(g), values, *where), g)
    if conv_kernel("input", shape, kept) == "dense":
        where = (positions, starts, None, None, None, rows, columns, panel, kept)
        return _dense.input(g.float(), values.float(), *where, *conv, size).to(g.dtype)
    if t_positions is None or t_starts is None or t_source is None:
        positions = listed(positions, rows, columns, panel, kept)
        t_positions, t_starts, t_source = transpose(positions, starts, rows, columns, panel)
    else:
        back = (t_positions, t_starts, t_source)
        check_transposed("masked_conv2d_input", back, rows, columns, panel, kept)
    maps, wide = g.contiguous(), values.float().contiguous()
    x = torch.empty((g.shape[0], shape[3], *size), dtype=torch.float32)
    weight = (
        wide.data_ptr(),
        t_source.data_ptr(),
        t_positions.data_ptr(),
        t_starts.data_ptr(),
        columns,
        rows,
        panel,
    )
    _C.masked_conv2d_input(shape, weight, _map(maps), x.data_ptr())
    return x.to(g.dtype, memory_format=format_of(g))


def masked_conv2d_kept(
    g: Tensor,
    x: Tensor,
    positions: Tensor,
    starts: Tensor,
    t_positions: Tensor | None,
    t_starts: Tensor | None,
    t_source: Tensor | None,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    conv = (kernel, stride, padding, dilation, groups)
    check_where("masked_conv2d_kept", positions, starts, rows, columns, panel, kept)
    check_maps("masked_conv2d_kept", {"g": g, "x": x}, x.shape[2:], rows, columns, *conv)
    shape = _shape(rows, columns, x.shape[0], tuple(x.shape[2:]), *conv)
    if _is_linear(shape, g) and _is_linear(shape, x):
        back = (t_positions, t_starts, t_source)
        where = (positions, starts, *back, rows, columns, panel, kept)
        return masked_linear_kept(_pixels(g), _pixels(x), *where)
    if conv_kernel("kept", shape, kept) == "dense":
        where = (positions, starts, None, None, None, rows, columns, panel, kept)
        return _dense.kept(g.float(), x.float(), *where, *conv).to(g.dtype)
    positions = listed(positions, rows, columns, panel, kept)
    g, x = g.contiguous(), x.contiguous()
    found = torch.empty(kept, dtype=torch.float32)
    _C.masked_conv2d_kept(
        shape,
        (0, 0, positions.data_ptr(), starts.data_ptr(), rows, columns, panel),
        _map(g),
        _map(x),
        found.data_ptr(),
    )
    return found.to(g.dtype)


def _shape(
    rows: int,
    columns: int,
    batch: int,
    size: tuple[int, ...],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, ...]:
    """batch, groups, rows, channels, then pairs: size, kernel, stride, padding, dilation, out."""
    channels = columns // (kernel[0] * kernel[1]) * groups
    return (
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


def _is_linear(shape: tuple[int, ...], maps: Tensor) -> bool:
    """Whether the rows of channels_last maps are those of a linear layer.

    Contiguous maps are not turned for it: at 512 x 128, 28 x 28, 32 images and density 0.1 that
    would be 22 ms, where the 1x1 kernel takes 4 and a linear layer over rows that are there 8.
    """
    if shape[1] != 1 or shape[6:12] != (1, 1, 1, 1, 0, 0):
        return False
    return format_of(maps) == torch.channels_last


def _pixels(maps: Tensor) -> Tensor:
    """`[batch * H * W, channels]`, a view of channels_last maps."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _as_maps(rows: Tensor, like: Tensor) -> Tensor:
    batch, _, high, wide = like.shape
    return rows.view(batch, high, wide, rows.shape[1]).permute(0, 3, 1, 2)


def _map(tensor: Tensor) -> tuple[int, int]:
    known = _TYPES.get(tensor.dtype)
    if known is None:
        refuse_dtype("masked_conv2d", tensor.dtype)
    return tensor.data_ptr(), known
