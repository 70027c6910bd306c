"""masked_conv2d by the library's convolution on the weight made dense for the length of the call.

Backend-neutral: a backend gives its own `scatter_kept` and `gather_kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

Operation = Callable[..., Tensor]


def out_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Rows and columns of the result, of those of x; they may be symbolic."""
    high, wide = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return high, wide


class Operations(NamedTuple):
    """The three operations of a backend, with the arguments that `ops.masked_conv2d` declares."""

    output: Operation
    input: Operation
    kept: Operation


def operations(scatter_kept: Operation, gather_kept: Operation) -> Operations:
    """`masked_conv2d`, `masked_conv2d_input` and `masked_conv2d_kept` around a library."""

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
        if rows * columns * x.shape[0] == 0:  # libraries refuse some of them
            size = out_size(x.shape[2:], kernel, stride, padding, dilation)
            zeros = x.new_zeros(x.shape[0], rows, *size)
            y = zeros if bias is None else zeros + bias[:, None, None]
            return y.contiguous(memory_format=format_of(x))
        dense = scatter_kept(values, positions, starts, rows, columns, panel, kept)
        weight = _as_conv(dense, kernel, x)
        y = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
        return y.contiguous(memory_format=format_of(x))

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
        if rows * columns * g.shape[0] == 0:
            x = g.new_zeros(g.shape[0], columns // (kernel[0] * kernel[1]) * groups, *size)
            return x.contiguous(memory_format=format_of(g))
        dense = scatter_kept(values, positions, starts, rows, columns, panel, kept)
        weight = _as_conv(dense, kernel, g)
        shape = (g.shape[0], weight.shape[1] * groups, *size)
        x = conv2d_input(shape, weight, g, list(stride), list(padding), list(dilation), groups)
        return x.contiguous(memory_format=format_of(g))

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
        if kept * x.shape[0] == 0:
            return g.new_zeros(kept)
        shape = (rows, columns // (kernel[0] * kernel[1]), *kernel)
        gradient = conv2d_weight(x, shape, g, list(stride), list(padding), list(dilation), groups)
        dense = gradient.reshape(rows, columns).contiguous()
        return gather_kept(dense, positions, starts, rows, columns, panel, kept)

    return Operations(masked_conv2d, masked_conv2d_input, masked_conv2d_kept)


def _as_conv(dense: Tensor, kernel: Sequence[int], like: Tensor) -> Tensor:
    """`[out, in / groups, kh, kw]` in the memory format of a map."""
    rows, columns = dense.shape
    weight = dense.view(rows, columns // (kernel[0] * kernel[1]), *kernel)
    return weight.contiguous(memory_format=format_of(like))


def format_of(maps: Tensor) -> torch.memory_format:
    """The memory format of what is made of these maps."""
    if not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
