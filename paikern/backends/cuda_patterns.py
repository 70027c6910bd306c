"""Structured masks by CUDA (csrc/cuda/patterns.cuh)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends.blocks import blocks_of, matrix_of
from paikern.backends.cuda_launch import Step, elementwise, run
from paikern.backends.cuda_layers import TYPES, bits_for
from paikern.backends.errors import refuse_nan

__all__ = [
    "block_means",
    "block_means_factored",
    "expand_blocks",
    "nm_mask",
    "nm_mask_factored",
]

_NO_NAN = 2**63 - 1


class _Scores:
    """The first arguments of a kernel, and the tensors that they point at."""

    def __init__(
        self,
        scores: Tensor,
        absolute: bool = False,
        a: Tensor | None = None,
        g: Tensor | None = None,
        mask: Tensor | None = None,
        power: int = 1,
    ) -> None:
        self.data = scores.detach().contiguous()
        if self.data.dtype == torch.float64 and a is not None:
            self.data = self.data.float()  # factored scores are float32 from the weight on
        self.a = None if a is None else a.detach().float().contiguous()
        self.g = None if g is None else g.detach().float().contiguous()
        self.mask = None if mask is None or mask.numel() == 0 else mask.contiguous()
        self.wide = self.data.dtype == torch.float64
        others = (0 if t is None else t.data_ptr() for t in (self.a, self.g, self.mask))
        kind = TYPES.get(self.data.dtype, 0)
        self.arguments = (self.data.data_ptr(), kind, int(absolute), *others, power)

    def kernel(self, name: str) -> str:
        return f"{name}_64" if self.wide else name


def _no_nan(like: Tensor) -> Tensor:
    return like.new_full((1,), _NO_NAN, dtype=torch.int64)


def _refuse(operation: str, nan: Tensor) -> None:
    found = int(nan)
    refuse_nan(operation, -1 if found == _NO_NAN else found)


def _nm(
    operation: str, sources: Sequence[_Scores], n: int, m: int, dims: Sequence[int]
) -> list[Tensor]:
    nan = _no_nan(sources[0].data)
    bits, steps = [bits_for(source.data) for source in sources], []
    for index, (source, dim, packed) in enumerate(zip(sources, dims, bits, strict=True)):
        shape = source.data.shape
        axis, inner = shape[dim], math.prod(shape[dim + 1 :])
        columns = matrix_of(shape)[1] if len(shape) > 1 else 1
        count = source.data.numel()
        geometry = (columns, int(dim == 0), count, axis, inner, n, m)
        arguments = (*source.arguments, *geometry, packed.data_ptr(), nan.data_ptr(), index)
        steps.append(elementwise(source.kernel("paikern_nm_mask"), count, *arguments))
    run(nan, steps)
    _refuse(operation, nan)
    return bits


def nm_mask(
    scores: Sequence[Tensor], n: int, m: int, dims: Sequence[int], absolute: bool
) -> list[Tensor]:
    return _nm("nm_mask", [_Scores(s, absolute) for s in scores], n, m, dims)


def nm_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    n: int,
    m: int,
    dims: Sequence[int],
    power: int,
) -> list[Tensor]:
    sources = [
        _Scores(w, False, x, y, mask, power)
        for w, x, y, mask in zip(weights, a, g, masks, strict=True)
    ]
    return _nm("nm_mask_factored", sources, n, m, dims)


def _means(operation: str, source: _Scores, block: Sequence[int]) -> Tensor:
    shape = source.data.shape
    rows, columns = matrix_of(shape)
    nan, count = _no_nan(source.data), blocks_of(shape, block)
    means = source.data.new_empty(count, dtype=torch.float64)
    arguments = (*source.arguments, rows, columns, *block, means.data_ptr(), nan.data_ptr())
    kernel = source.kernel("paikern_block_means")
    run(nan, [elementwise(kernel, 8 * means.numel(), *arguments)])
    _refuse(operation, nan)
    return means


def block_means(scores: Tensor, block: Sequence[int], absolute: bool) -> Tensor:
    return _means("block_means", _Scores(scores, absolute), block)


def block_means_factored(
    weight: Tensor, a: Tensor, g: Tensor, mask: Tensor, block: Sequence[int], power: int
) -> Tensor:
    return _means("block_means_factored", _Scores(weight, False, a, g, mask, power), block)


def expand_blocks(packed: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    rows, columns = matrix_of(shape)
    blocks, count = packed.contiguous(), rows * columns
    bits = packed.new_empty((count + 7) // 8)
    across = blocks_of(shape, block)[1]
    arguments = (blocks.data_ptr(), count, columns, *block, across, bits.data_ptr())
    steps: list[Step] = [elementwise("paikern_expand_blocks", count, *arguments)]
    run(packed, steps)
    return bits
