"""masked_linear by CUDA (csrc/cuda/masked*.cuh), and which kernel runs.

"index" multiplies the entries one by one, "decode" makes tiles for tensor cores from the bits of a
bitmap, "dense" makes the weight dense for the length of the call and leaves the product to the
library; its gradient is dense for some rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paikern.backends.cuda_launch import Step, elementwise, run
from paikern.backends.cuda_layers import TYPES
from paikern.backends.cuda_positions import (
    WARPS,
    Packed,
    Where,
    ceil,
    gather_rows,
    listed,
    scatter_kept,
    transpose_positions,
)

__all__ = ["masked_linear", "masked_linear_input", "masked_linear_kept"]

_WANTED = 4096  # warps that a product is cut into at least, where it has the work
_FEW = 4  # rows of x that are multiplied where they lie
_FEW_DOTS = 8
_TILE_ROWS = 32  # of a block of the decoding kernel
_WANTED_BLOCKS = 264
_DECODED = 512  # columns of a block at least, 64 a warp
_ROW_BLOCK = 1 << 24  # numbers of a gradient that are dense at a time: 32 MB of halves


class Rule(NamedTuple):
    """Up to this density and batch; the first rule that fits counts."""

    operation: str  # "output", "input" or "kept"
    bitmap: bool
    halves: bool  # for bfloat16 and float16 alone
    density: float
    batch: int
    kernel: str
    measured: str


_ANY = 1 << 62
# What is expected of an H200: a product by index takes 64 bytes or more of x from L2 for an entry,
# the dense way writes and reads the whole weight, and from some hundred rows of x on tensor cores
# leave less and less to gain. The values of the transposed weight lie apart: 32 bytes are read for
# each of them.
RULES = (
    Rule("output", False, False, 1.0, 4, "index", "not yet measured"),
    Rule("output", False, False, 0.03, _ANY, "index", "not yet measured"),
    Rule("output", False, False, 0.1, 32, "index", "not yet measured"),
    Rule("output", True, True, 1.0, 64, "decode", "not yet measured"),
    Rule("output", True, False, 1.0, 4, "index", "not yet measured"),
    Rule("input", False, False, 0.03, _ANY, "index", "not yet measured"),
    Rule("input", False, False, 0.1, 32, "index", "not yet measured"),
    Rule("kept", False, False, 1.0, 4, "index", "not yet measured"),
    Rule("kept", False, False, 0.03, _ANY, "index", "not yet measured"),
)


def choose(operation: str, where: Where, dtype: torch.dtype, batch: int) -> str:
    """The kernel of an operation: "index", "decode" or "dense"."""
    positions, _, rows, columns, _, kept = where
    bitmap, half = positions.dtype == torch.uint8, dtype != torch.float32
    density = kept / max(1, rows * columns)
    for rule in RULES:
        fits = rule.operation == operation and rule.bitmap == bitmap and rule.halves <= half
        if fits and density <= rule.density and batch <= rule.batch:
            return rule.kernel
    return "dense"


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
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        rest = (positions, starts, t_positions, t_starts, t_source, rows, columns, panel, kept)
        wide = None if bias is None else bias.float()
        return masked_linear(x.float(), values.float(), wide, *rest).to(x.dtype)
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    if kept == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand(y.shape))
    flat = x.reshape(-1, columns).contiguous()
    where = (positions.contiguous(), starts.contiguous(), rows, columns, panel, kept)
    bias = None if bias is None else bias.contiguous()
    kernel = choose("output", where, x.dtype, flat.shape[0])
    if kernel == "dense":
        dense = scatter_kept(values, *where)
        return torch.nn.functional.linear(flat, dense, bias).view(y.shape)
    if kernel == "decode":
        _decode(where, values.contiguous(), flat, bias, y)
        return y
    if positions.dtype == torch.uint8 and flat.shape[0] <= _FEW:
        _few_bits(where, values.contiguous(), flat, bias, y)
        return y
    columns16 = listed(*where)
    packed = Packed(values.contiguous(), None, columns16, where[1], rows, columns, panel, kept)
    _product(packed, flat, bias, y)
    return y


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
    if values.dtype != g.dtype:
        rest = (positions, starts, t_positions, t_starts, t_source, rows, columns, panel, kept)
        return masked_linear_input(g.float(), values.float(), *rest).to(g.dtype)
    x = g.new_empty((*g.shape[:-1], columns))
    if x.numel() == 0 or kept == 0:
        return x.zero_()
    flat = g.reshape(-1, rows).contiguous()
    where = (positions.contiguous(), starts.contiguous(), rows, columns, panel, kept)
    if choose("input", where, g.dtype, flat.shape[0]) == "dense":
        return torch.mm(flat, scatter_kept(values, *where)).view(x.shape)
    if t_positions is None or t_starts is None or t_source is None:
        t_positions, t_starts, t_source = transpose_positions(
            listed(*where), where[1], rows, columns, panel
        )
    back = (t_positions.contiguous(), t_starts.contiguous(), columns, rows, panel, kept)
    _product(Packed(values.contiguous(), t_source.contiguous(), *back), flat, None, x)
    return x


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
    if x.dtype != g.dtype:
        rest = (positions, starts, t_positions, t_starts, t_source, rows, columns, panel, kept)
        return masked_linear_kept(g.float(), x.float(), *rest).to(g.dtype)
    found = g.new_empty(kept)
    if kept == 0 or g.numel() == 0:
        return found.zero_()
    flat_g, flat_x = g.reshape(-1, rows).contiguous(), x.reshape(-1, columns).contiguous()
    where = (positions.contiguous(), starts.contiguous(), rows, columns, panel, kept)
    if choose("kept", where, g.dtype, flat_g.shape[0]) == "dense":
        some = max(1, _ROW_BLOCK // columns)
        for top in range(0, rows, some):
            gradient = torch.mm(flat_g[:, top : top + some].T, flat_x)
            gather_rows(gradient, found, where, top)
        return found
    packed = Packed(None, None, listed(*where), where[1], rows, columns, panel, kept)
    _dots(packed, flat_g, flat_x, found)
    return found


def _even(tensor: Tensor) -> Tensor:
    """From a multiple of 16 bytes on."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def parts(warps: int, entries: float, each: int) -> int:
    """Into how many parts a row is cut, none of them of less than `each` entries."""
    return max(1, min(ceil(_WANTED, max(1, warps)), int(entries // each)))


def _summed(rows: int, y: Tensor, bias: Tensor | None, cut: int) -> tuple[Tensor, list[Step]]:
    """Where a product writes: its result, or parts that a step adds up."""
    if cut == 1:
        return y, []
    count = y.numel()
    partial = torch.empty(cut * count, dtype=torch.float32, device=y.device)
    arguments = (partial.data_ptr(), cut, rows, count, TYPES[y.dtype])
    more = (_address(bias), y.data_ptr())
    return partial, [elementwise("paikern_masked_parts", count, *arguments, *more)]


def _few_bits(
    where: Where,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    bits, starts, rows, columns, panel, kept = where
    packed = Packed(values, None, bits, starts, rows, columns, panel, kept)
    cut = min(parts(rows, columns, 1024), ceil(columns, panel))
    to, add = _summed(rows, y, bias, cut)
    more = (TYPES[x.dtype], bits.data_ptr(), x.data_ptr(), x.shape[0], _address(bias), cut)
    arguments = (*packed.arguments(), *more, to.data_ptr())
    run(x, [Step("paikern_masked_few_bits", ceil(rows * cut, WARPS), arguments), *add])


def _decode(
    where: Where,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """y `[batch, rows]` = x `[batch, columns]` V^T + bias, up to 64 rows of x, tensor cores."""
    bits, starts, rows, columns, panel, kept = where
    values, x = _even(values), _even(torch.nn.functional.pad(x, (0, -columns % 8)))
    packed = Packed(values, None, bits, starts, rows, columns, panel, kept)
    tiles, blocks = next(n for n in (1, 2, 4, 8) if 8 * n >= x.shape[0]), ceil(rows, _TILE_ROWS)
    cut = min(ceil(_WANTED_BLOCKS, blocks), ceil(columns, panel), ceil(columns, _DECODED))
    to, add = _summed(rows, y, bias, cut)
    more = (TYPES[x.dtype], bits.data_ptr(), x.data_ptr(), x.shape[1], x.shape[0])
    arguments = (*packed.arguments(), *more, _address(bias), cut, to.data_ptr())
    run(x, [Step(f"paikern_masked_decode_{tiles}", blocks * cut, arguments), *add])


def _product(packed: Packed, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y `[batch, rows]` = x `[batch, columns]` V^T + bias by index."""
    batch, rows, each = x.shape[0], packed.rows, packed.kept / packed.rows
    kind = TYPES[x.dtype]
    if batch <= _FEW:
        lanes = next(n for n in (4, 8, 16, 32) if n == 32 or 16 * n >= each)
        cut = parts(ceil(rows * lanes, 32), each, 16 * lanes)
        to, add = _summed(rows, y, bias, cut)
        few = (kind, x.data_ptr(), batch, _address(bias), lanes, cut, to.data_ptr())
        step = elementwise("paikern_masked_few", rows * lanes * cut, *packed.arguments(), *few)
        run(x, [step, *add])
        return
    wide, count = _widths(batch)
    cut = parts(rows * count, each, 64)
    to, add = _summed(rows, y, bias, cut)
    panels, made = _panels(x, wide)
    more = (kind, panels.data_ptr(), batch, _address(bias), cut, to.data_ptr())
    blocks = ceil(rows, WARPS) * cut * count
    step = Step(f"paikern_masked_rows_{wide}", blocks, (*packed.arguments(), *more))
    run(x, [made, step, *add])


def _dots(packed: Packed, g: Tensor, x: Tensor, found: Tensor) -> None:
    """The sums of products at the kept positions by index."""
    batch, rows, kind = g.shape[0], packed.rows, TYPES[g.dtype]
    cut = parts(rows, packed.kept / rows, 32)
    blocks = ceil(rows, WARPS) * cut
    if batch <= _FEW_DOTS:
        few = (kind, g.data_ptr(), x.data_ptr(), batch, cut, found.data_ptr())
        run(x, [Step("paikern_masked_dots_few", blocks, (*packed.arguments(), *few))])
        return
    wide, count = _widths(batch)
    (left, g_made), (right, x_made) = _panels(g, wide), _panels(x, wide)
    more = (kind, left.data_ptr(), right.data_ptr(), count, cut, found.data_ptr())
    step = Step(f"paikern_masked_dots_{wide}", blocks, (*packed.arguments(), *more))
    run(x, [g_made, x_made, step])


def _widths(batch: int) -> tuple[int, int]:
    """Rows of x of a lane, and how many panels there are."""
    wide = 1 if batch <= 32 else 2 if batch <= 64 else 4
    return wide, ceil(batch, 32 * wide)


def _panels(x: Tensor, wide: int) -> tuple[Tensor, Step]:
    """Room for the panels of x, and the step that writes them."""
    batch, columns = x.shape
    width = 32 * wide
    panels = x.new_empty(ceil(batch, width) * columns * width)
    blocks = ceil(columns, 32) * ceil(batch, width) * wide
    arguments = (x.data_ptr(), TYPES[x.dtype], batch, columns, width, panels.data_ptr())
    return panels, Step("paikern_masked_panels", blocks, arguments)
