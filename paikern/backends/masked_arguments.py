"""Whether the arguments of the packed operations fit: kernels read and write as these say.

What is looked at is what a call can get wrong: shapes, types, and that as many weights are kept as
are listed. The columns and the bits themselves are taken as `list_positions` made them.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_MOST_COLUMNS = 1 << 16
_last = ctypes.c_int32.from_address
# What fitted, by the identity of the starts: a look at every tensor again is 1 us of each call.
_fitted: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, ...]]] = {}
_MOST_FITTED = 4096


def check_values(
    name: str,
    values: Tensor,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> None:
    """Values `[kept]` and where they belong."""
    check_where(name, positions, starts, rows, columns, panel, kept)
    if values.numel() != kept or values.dim() != 1:
        refuse_values(name, kept, values)


def check_where(
    name: str,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> None:
    known = _fitted.get(id(starts))
    sizes = (rows, columns, panel, kept)
    if known and known[2] == sizes and known[0]() is starts and known[1]() is positions:
        return
    length = _starts(rows, columns, panel)
    if positions.dtype is torch.int16:
        fits = positions.numel() == kept
    else:
        fits = positions.dtype is torch.uint8 and positions.numel() * 8 >= rows * columns
    if (
        not fits
        or starts.numel() != length
        or starts.dtype is not torch.int32
        or not starts.is_contiguous()
        or not positions.is_contiguous()
    ):
        _refuse_where(name, positions, starts, rows, columns, panel, kept)
    # On a GPU the entry would be waited for.
    if starts.is_cpu and _last(starts.data_ptr() + 4 * length - 4).value != kept:
        found = int(starts[-1])
        raise ValueError(
            f"{name}: values must be [{found}] for this weight, kept says {kept}; pass the kept "
            "values and their number as PackedWeight has them"
        )
    if not torch.compiler.is_compiling():
        if len(_fitted) >= _MOST_FITTED:
            _fitted.clear()
        _fitted[id(starts)] = weakref.ref(starts), weakref.ref(positions), sizes


def check_transposed(
    name: str, back: Sequence[Tensor | None], rows: int, columns: int, panel: int, kept: int
) -> None:
    """The positions of the transposed weight, where all three are given."""
    t_positions, t_starts, t_source = back
    if t_positions is None or t_starts is None or t_source is None:
        return
    check_where(name, t_positions, t_starts, columns, rows, panel, kept)
    wrong = t_source.numel() != kept or t_source.dtype is not torch.int32
    if wrong or t_positions.dtype is not torch.int16 or not t_source.is_contiguous():
        raise ValueError(
            f"{name}: t_positions and t_source must be contiguous int16 and int32 [{kept}], got "
            f"{_kind(t_positions)} and {_kind(t_source)}; use PackedWeight.where"
        )


def check_rows(name: str, argument: str, tensor: Tensor, width: int) -> None:
    """`[..., width]`."""
    if tensor.dim() == 0 or tensor.size(-1) != width:
        raise ValueError(
            f"{name}: {argument} must be [..., {width}] for this weight, got {tuple(tensor.shape)}"
        )


def check_matrix(name: str, dense: Tensor, rows: int, columns: int) -> None:
    if tuple(dense.shape) != (rows, columns):
        raise ValueError(
            f"{name}: dense must be [{rows}, {columns}], got {tuple(dense.shape)}; reshape it"
        )


def check_bias(name: str, bias: Tensor | None, rows: int) -> None:
    if bias is not None and (bias.numel() != rows or bias.dim() != 1):
        raise ValueError(f"{name}: bias must be [{rows}] for this weight, got {tuple(bias.shape)}")


def check_pair(name: str, g: Tensor, x: Tensor, rows: int, columns: int) -> None:
    """`[..., rows]` and `[..., columns]` of as many rows."""
    check_rows(name, "g", g, rows)
    check_rows(name, "x", x, columns)
    if g.shape[:-1].numel() != x.shape[:-1].numel():
        raise ValueError(
            f"{name}: g and x must hold as many rows, got {tuple(g.shape)} and {tuple(x.shape)}"
        )


def check_maps(
    name: str,
    maps: dict[str, Tensor],
    x_size: Sequence[int],
    rows: int,
    columns: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """x `[batch, in, H, W]` and g `[batch, out, H', W']` of a convolution, those that are given."""
    conv = (("kernel", kernel, 1), ("stride", stride, 1), ("padding", padding, 0))
    for argument, pair, least in (*conv, ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name}: {argument} must be 2 integers >= {least}, got {list(pair)}")
    taps = kernel[0] * kernel[1]
    if groups < 1 or rows % groups or columns % taps:
        raise ValueError(
            f"{name}: groups must divide the {rows} rows of the weight and the kernel its "
            f"{columns} columns, got {groups} and {list(kernel)}"
        )
    if len(x_size) != 2:
        raise ValueError(f"{name}: x must have 2 axes of pixels, got {list(x_size)}")
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x_size, kernel, stride, padding, dilation, strict=True)
    ]
    if min(out) < 1:
        raise ValueError(
            f"{name}: the kernel {list(kernel)} with padding {list(padding)} and dilation "
            f"{list(dilation)} is larger than the map {list(x_size)}"
        )
    wanted = {"x": [columns // taps * groups, *x_size], "g": [rows, *out]}
    batch = next(iter(maps.values())).shape[:1]
    for argument, tensor in maps.items():
        if list(tensor.shape) != [*batch, *wanted[argument]]:
            raise ValueError(
                f"{name}: {argument} must be {[*batch, *wanted[argument]]} for this weight, got "
                f"{list(tensor.shape)}"
            )


def refuse_values(name: str, kept: int, values: Tensor) -> NoReturn:
    raise ValueError(
        f"{name}: values must be [{kept}] for this weight, got {tuple(values.shape)}; pass the "
        "kept values in row-major order, as PackedWeight.gather makes them"
    )


def refuse_dtype(name: str, dtype: torch.dtype) -> NoReturn:
    raise TypeError(
        f"{name}: the weight must be float32, bfloat16, float16 or float64, got {dtype}; convert it"
    )


@functools.lru_cache(maxsize=4096)
def _starts(rows: int, columns: int, panel: int) -> int:
    """How many starts a weight has."""
    if rows < 0 or columns < 0 or not 1 <= panel <= _MOST_COLUMNS or panel & (panel - 1):
        raise ValueError(
            "packed weight: rows and columns must be 0 or more and panel a power of two up to "
            f"{_MOST_COLUMNS}, got {rows}, {columns} and {panel}"
        )
    return rows * -(-columns // panel) + 1


def _refuse_where(
    name: str,
    positions: Tensor,
    starts: Tensor,
    rows: int,
    columns: int,
    panel: int,
    kept: int,
) -> NoReturn:
    if positions.dtype is torch.int16 and positions.numel() != kept:
        raise ValueError(
            f"{name}: values must be [{positions.numel()}] for this weight, kept says {kept}; pass "
            "the kept values and their number as PackedWeight has them"
        )
    raise ValueError(
        f"{name}: positions must be contiguous int16 [{kept}] or bits (uint8) of "
        f"{rows} x {columns}, and starts int32 [{_starts(rows, columns, panel)}], got "
        f"{_kind(positions)} and {_kind(starts)}; use PackedWeight.where"
    )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
