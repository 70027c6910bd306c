"""masked_conv2d: the library's convolution on the weight made dense for the length of the call.

The kernels here are those of `masked_words`: kept values to a dense weight, and those of its
gradient back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paikern.backends.dense_masked_conv import operations
from paikern.backends.triton.masked_words import gather_kept, scatter_kept

_dense = operations(scatter_kept, gather_kept)


def masked_conv2d(x: Tensor, values: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return _dense.output(x, values, bias, *rest)


def masked_conv2d_input(g: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return _dense.input(g, values, *rest)


def masked_conv2d_kept(g: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return _dense.kept(g, x, *rest)
