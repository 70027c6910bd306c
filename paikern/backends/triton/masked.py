"""masked_linear, masked_linear_input, masked_linear_kept: which kernels run, by one table.

index    kept weights one by one (masked_index)
decode   tiles of the weight made dense on chip, for matrix units (masked_decode)
library  the weight made dense in memory, once a call, for the product of cuBLAS or rocBLAS

Bitmaps are decoded but for few rows of x. The gradient of the values is never dense: where the
product would be the library's, it is decoded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paikern.backends.triton import masked_decode, masked_index
from paikern.backends.triton.masked_index import FEW, Entries
from paikern.backends.triton.masked_words import (
    scatter_kept,
    transpose_positions,
    words_of,
)


class Choice(NamedTuple):
    """For values of so many bytes: densities up to `sparse` go by entries, batches from `library`
    on to the library."""

    sparse: float
    library: int


# Where the multiply-adds of ordinary units, at the 27 % of their peak that published kernels reach,
# equal those of matrix units (bfloat16) or of a dense float32 product. Not yet measured.
CHOICES = {2: Choice(0.023, 512), 4: Choice(0.27, 512)}


def kernel_of(bits: bool, size: int, density: float, batch: int) -> str:
    """ "index", "decode" or "library", for positions that are bits or listed.

    Example:
        >>> kernel_of(False, 2, 0.1, 64), kernel_of(False, 2, 0.01, 64)
        ('decode', 'index')
    """
    choice = CHOICES[size]
    if not bits and (batch <= FEW or density <= choice.sparse):
        return "index"
    return "decode" if batch < choice.library else "library"


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
    shape, flat = (*x.shape[:-1], rows), _rows(x, columns)
    if kept == 0 or flat.shape[0] == 0:
        return x.new_zeros(shape) if bias is None else bias.expand(shape).contiguous()
    values = values.to(x.dtype).contiguous()
    kernel = _chosen(positions, flat, rows, columns, kept)
    if kernel == "library":
        dense = scatter_kept(values, positions, starts, rows, columns, panel, kept)
        y = torch.nn.functional.linear(flat, dense, bias)
    elif kernel == "index" or flat.shape[0] <= FEW:
        v = Entries(values, positions.contiguous(), starts, None, rows, columns, panel)
        y = masked_index.product(v, flat, bias)
    else:
        table = words_of(positions, starts, rows, columns, panel)
        y = masked_decode.product(table, values, flat, rows, bias)
    return y.reshape(shape)


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
    shape, flat = (*g.shape[:-1], columns), _rows(g, rows)
    if kept == 0 or flat.shape[0] == 0:
        return g.new_zeros(shape)
    values = values.to(g.dtype).contiguous()
    kernel = _chosen(positions, flat, rows, columns, kept)
    if kernel == "library":
        x = flat @ scatter_kept(values, positions, starts, rows, columns, panel, kept)
    elif kernel == "index":
        if t_positions is None or t_starts is None or t_source is None:
            t_positions, t_starts, t_source = transpose_positions(
                positions, starts, rows, columns, panel
            )
        v = Entries(values, t_positions, t_starts, t_source, columns, rows, panel)
        x = masked_index.product(v, flat, None)
    else:
        table = words_of(positions, starts, rows, columns, panel)
        x = masked_decode.product_input(table, values, flat, columns)
    return x.reshape(shape)


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
    flat_g, flat_x = _rows(g, rows), _rows(x.to(g.dtype), columns)
    if kept == 0 or flat_g.shape[0] == 0:
        return g.new_zeros(kept)
    if _chosen(positions, flat_g, rows, columns, kept) == "index":
        v = Entries(g, positions.contiguous(), starts, None, rows, columns, panel)
        return masked_index.gradient(v, flat_g, flat_x, kept)
    table = words_of(positions, starts, rows, columns, panel)
    return masked_decode.gradient(table, flat_g, flat_x, kept)


def _rows(tensor: Tensor, width: int) -> Tensor:
    """`[batch, width]`, contiguous."""
    return tensor.reshape(tensor.shape[:-1].numel(), width).contiguous()


def _chosen(positions: Tensor, x: Tensor, rows: int, columns: int, kept: int) -> str:
    bits, density = positions.dtype == torch.uint8, kept / (rows * columns)
    return kernel_of(bits, x.element_size(), density, x.shape[0])
