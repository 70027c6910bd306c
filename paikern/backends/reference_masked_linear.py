"""masked_linear in plain PyTorch: the weight is made dense, whatever that costs."""

from __future__ import annotations

import torch
from torch import Tensor

from paikern.backends.masked_arguments import (
    check_bias,
    check_matrix,
    check_pair,
    check_rows,
    check_values,
    check_where,
)

COLUMNS = 1 << 16


def list_positions(
    mask: Tensor, kept: int, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor]:
    row, column = _of_bits(mask, rows, columns)
    if row.numel() != kept:
        raise ValueError(f"list_positions: {row.numel()} bits are set, kept says {kept}")
    return _packed(row, column, rows, columns, panel)


def transpose_positions(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor, Tensor]:
    row, column = entries(positions, starts, rows, columns, panel)
    source = torch.argsort(column, stable=True)
    packed = _packed(column[source], row[source], columns, rows, panel)
    return *packed, source.to(torch.int32)


def entries(
    positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor]:
    """Row and column of every kept weight, row-major; positions may be packed bits."""
    if positions.dtype == torch.uint8:
        return _of_bits(positions, rows, columns)
    panels = -(-columns // panel)
    cells = torch.arange(rows * panels, device=starts.device)
    cell = torch.repeat_interleave(cells, starts.diff().long())
    row = cell // max(panels, 1)
    base = (cell - row * panels) * panel // COLUMNS * COLUMNS
    return row, base + (positions.long() & 0xFFFF)


def _of_bits(bits: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    kept = flat.reshape(-1)[: rows * columns].nonzero()[:, 0]
    row = kept // max(columns, 1)
    return row, kept - row * columns


def _packed(
    row: Tensor, column: Tensor, rows: int, columns: int, panel: int
) -> tuple[Tensor, Tensor]:
    panels = -(-columns // panel)
    starts = torch.zeros(rows * panels + 1, dtype=torch.int64, device=row.device)
    cell = row * panels + column // panel
    starts[1:] = torch.bincount(cell, minlength=rows * panels).cumsum(0)
    return (column % COLUMNS).to(torch.int16), starts.to(torch.int32)


def dense(
    values: Tensor, positions: Tensor, starts: Tensor, rows: int, columns: int, panel: int
) -> Tensor:
    """W * M in the dtype of sums: float32, or float64 for float64."""
    row, column = entries(positions, starts, rows, columns, panel)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    zeros = wide.new_zeros(rows, columns)
    return zeros.index_put((row, column), wide)


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
    at = entries(positions, starts, rows, columns, panel)
    return values.new_zeros(rows, columns).index_put(at, values)


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
    return dense[entries(positions, starts, rows, columns, panel)]


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
    check_rows("masked_linear", "x", x, columns)
    check_bias("masked_linear", bias, rows)
    weight = dense(values, positions, starts, rows, columns, panel)
    y = x.to(weight.dtype) @ weight.T
    return (y if bias is None else y + bias.to(weight.dtype)).to(x.dtype)


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
    check_rows("masked_linear_input", "g", g, rows)
    weight = dense(values, positions, starts, rows, columns, panel)
    return (g.to(weight.dtype) @ weight).to(g.dtype)


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
    row, column = entries(positions, starts, rows, columns, panel)
    sums = torch.promote_types(g.dtype, torch.float32)
    gradient = g.reshape(-1, rows).to(sums).T @ x.reshape(-1, columns).to(sums)
    return gradient[row, column].to(g.dtype)
