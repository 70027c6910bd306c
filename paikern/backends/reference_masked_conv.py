"""masked_conv2d in plain PyTorch: a dense convolution in the dtype of sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paikern.backends.dense_masked_conv import operations
from paikern.backends.reference_masked_linear import gather_kept, scatter_kept

_dense = operations(scatter_kept, gather_kept)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def masked_conv2d(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    add = None if bias is None else _wide(bias)
    return _dense.output(_wide(x), _wide(values), add, *rest).to(x.dtype)


def masked_conv2d_input(g: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return _dense.input(_wide(g), _wide(values), *rest).to(g.dtype)


def masked_conv2d_kept(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _dense.kept(_wide(g), _wide(x), *rest).to(g.dtype)
