"""masked_conv2d in plain PyTorch: a dense convolution in the dtype of sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paikern.backends.dense_masked_conv import operations
from paikern.backends.masked_arguments import check_bias, check_maps, check_values, check_where
from paikern.backends.reference_masked_linear import gather_kept, scatter_kept

_dense = operations(scatter_kept, gather_kept)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def masked_conv2d(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    _check("masked_conv2d", {"x": x}, values, rest, x.shape[2:])
    check_bias("masked_conv2d", bias, rest[5])
    add = None if bias is None else _wide(bias)
    return _dense.output(_wide(x), _wide(values), add, *rest).to(x.dtype)


def masked_conv2d_input(g: Tensor, values: Tensor, *rest: Any) -> Tensor:
    _check("masked_conv2d_input", {"g": g}, values, rest, rest[14])
    return _dense.input(_wide(g), _wide(values), *rest).to(g.dtype)


def masked_conv2d_kept(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    _check("masked_conv2d_kept", {"g": g, "x": x}, None, rest, x.shape[2:])
    return _dense.kept(_wide(g), _wide(x), *rest).to(g.dtype)


def _check(
    name: str,
    maps: dict[str, Tensor],
    values: Tensor | None,
    rest: tuple[Any, ...],
    size: Sequence[int],
) -> None:
    positions, starts, _, _, _, rows, columns, panel, kept = rest[:9]
    if values is None:
        check_where(name, positions, starts, rows, columns, panel, kept)
    else:
        check_values(name, values, positions, starts, rows, columns, panel, kept)
    check_maps(name, maps, size, rows, columns, *rest[9:14])
