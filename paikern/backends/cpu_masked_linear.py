"""masked_linear on the CPU: csrc/cpu/masked_linear.h, or the library's product of decoded rows.

`masked_cost` says which of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern import _C
from paikern.backends import cpu_masked_decode as decode
from paikern.backends import masked_cost
from paikern.backends.masked_arguments import (
    check_bias,
    check_matrix,
    check_pair,
    check_rows,
    check_transposed,
    check_values,
    check_where,
    refuse_dtype,
)

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def list_positions(
    mask: Tensor, kept: int, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor]:
    mask = mask.contiguous()
    starts = torch.empty(rows * _panels(columns, panel) + 1, dtype=torch.int32)
    # Starts first: they tell how many positions will be written.
    _C.list_positions(mask.data_ptr(), rows, columns, panel, 0, starts.data_ptr())
    if int(starts[-1]) != kept:
        raise ValueError(f"list_positions: {int(starts[-1])} bits are set, kept says {kept}")
    positions = torch.empty(kept, dtype=torch.int16)
    if kept:
        _C.list_positions(
            mask.data_ptr(), rows, columns, panel, positions.data_ptr(), starts.data_ptr()
        )
    return positions, starts


def transpose_positions(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    positions, starts = positions.contiguous(), starts.contiguous()
    moved = torch.empty_like(positions)
    source = torch.empty(positions.shape, dtype=torch.int32)
    begins = torch.empty(columns * _panels(rows, panel) + 1, dtype=torch.int32)
    view = (0, 0, 0, positions.data_ptr(), starts.data_ptr(), rows, columns, panel)
    _C.transpose_positions(view, panel, moved.data_ptr(), begins.data_ptr(), source.data_ptr())
    return moved, begins, source


def scatter_kept(
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> Tensor:
    check_values("scatter_kept", values, positions, starts, rows, columns, panel, kept)
    values, size = values.contiguous(), values.element_size()
    dense = values.new_empty(rows, columns)
    where = _where(values.data_ptr(), positions, starts, rows, columns, panel)
    _C.scatter_kept(where, size, 0, rows, dense.data_ptr())
    return dense


def gather_kept(
    dense: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> Tensor:
    check_matrix("gather_kept", dense, rows, columns)
    check_where("gather_kept", positions, starts, rows, columns, panel, kept)
    dense, size = dense.contiguous(), dense.element_size()
    values = dense.new_empty(kept)
    where = _where(values.data_ptr(), positions, starts, rows, columns, panel)
    _C.gather_kept(where, size, 0, rows, dense.data_ptr())
    return values


def masked_linear(
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
) -> Tensor:
    check_values("masked_linear", values, positions, starts, rows, columns, panel, kept)
    check_bias("masked_linear", bias, rows)
    rows_of_x, add = _rows(x, columns, "masked_linear", "x"), None if bias is None else _float(bias)
    batch = rows_of_x.shape[0]
    if _decodes(positions, rows, columns, kept, batch) and decode.finite(rows_of_x):
        wide = _float(values)
        where = _where(wide.data_ptr(), positions, starts, rows, columns, panel)
        y = decode.forward(rows_of_x, add, where).view(*x.shape[:-1], rows)
    else:
        positions = listed(positions, rows, columns, panel, kept)
        values = values.contiguous()
        y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
        _C.masked_linear(
            _view(values, 0, positions, starts, rows, columns, panel),
            rows_of_x.data_ptr(),
            batch,
            0 if add is None else add.data_ptr(),
            y.data_ptr(),
        )
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def masked_linear_input(
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
) -> Tensor:
    check_values("masked_linear_input", values, positions, starts, rows, columns, panel, kept)
    rows_of_g = _rows(g, rows, "masked_linear_input", "g")
    batch = rows_of_g.shape[0]
    if _decodes(positions, rows, columns, kept, batch) and decode.finite(rows_of_g):
        wide = _float(values)
        where = _where(wide.data_ptr(), positions, starts, rows, columns, panel)
        x = decode.by_input(rows_of_g, where).view(*g.shape[:-1], columns)
    else:
        if t_positions is None or t_starts is None or t_source is None:
            positions = listed(positions, rows, columns, panel, kept)
            back = transpose_positions(positions, starts, rows, columns, panel)
            t_positions, t_starts, t_source = back
        else:
            back = (t_positions, t_starts, t_source)
            check_transposed("masked_linear_input", back, rows, columns, panel, kept)
        values = values.contiguous()
        x = torch.empty((*g.shape[:-1], columns), dtype=torch.float32)
        _C.masked_linear(
            _view(values, t_source.data_ptr(), t_positions, t_starts, columns, rows, panel),
            rows_of_g.data_ptr(),
            batch,
            0,
            x.data_ptr(),
        )
    return x if g.dtype == torch.float32 else x.to(g.dtype)


def masked_linear_kept(
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
) -> Tensor:
    check_where("masked_linear_kept", positions, starts, rows, columns, panel, kept)
    check_pair("masked_linear_kept", g, x, rows, columns)
    rows_of_g, rows_of_x = _rows(g, rows), _rows(x, columns)
    batch = rows_of_x.shape[0]
    found = torch.empty(kept, dtype=torch.float32)
    if _decodes(positions, rows, columns, kept, batch):
        where = _where(found.data_ptr(), positions, starts, rows, columns, panel)
        decode.by_kept(rows_of_g, rows_of_x, where)
    else:
        positions = listed(positions, rows, columns, panel, kept)
        _C.masked_linear_kept(
            (0, 0, 0, positions.data_ptr(), starts.data_ptr(), rows, columns, panel),
            rows_of_g.data_ptr(),
            rows_of_x.data_ptr(),
            batch,
            found.data_ptr(),
        )
    return found if g.dtype == torch.float32 else found.to(g.dtype)


def _decodes(positions: Tensor, rows: int, columns: int, kept: int, batch: int) -> bool:
    bits = positions.dtype == torch.uint8
    return masked_cost.cpu_kernel(rows, columns, kept, batch, bits) == "decode"


def _panels(columns: int, panel: int) -> int:
    return -(-columns // panel)


def _rows(tensor: Tensor, width: int, name: str = "masked_linear_kept", of: str = "g") -> Tensor:
    """`[batch, width]`, float32, contiguous."""
    flat = tensor.dim() == 2 and tensor.dtype == torch.float32 and tensor.is_contiguous()
    if flat and tensor.size(1) == width:
        return tensor
    check_rows(name, of, tensor, width)
    batch = tensor.numel() // width if width else tensor.shape[:-1].numel()
    return tensor.reshape(batch, width).float().contiguous()


def _float(tensor: Tensor) -> Tensor:
    plain = tensor.dtype == torch.float32 and tensor.is_contiguous()
    if not plain:
        _type(tensor)
    return tensor if plain else tensor.float().contiguous()


def listed(positions: Tensor, rows: int, columns: int, panel: int, kept: int) -> Tensor:
    """16-bit columns, also of a bitmap: for the length of a call."""
    if positions.dtype == torch.int16:
        return positions
    return list_positions(positions, kept, rows, columns, panel)[0]


def _type(values: Tensor) -> int:
    known = _TYPES.get(values.dtype)
    return refuse_dtype("masked_linear", values.dtype) if known is None else known


def _where(
    values: int, positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> tuple[int, ...]:
    bits = positions.dtype == torch.uint8
    return (values, positions.data_ptr(), bits, starts.data_ptr(), rows, columns, panel)


def _view(
    values: Tensor,
    source: int,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
) -> tuple[Any, ...]:
    return (
        values.data_ptr(),
        _type(values),
        source,
        positions.data_ptr(),
        starts.data_ptr(),
        rows,
        columns,
        panel,
    )
