"""The CPU backend of structured masks. Tensors are read where they lie, whatever their strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern import _C
from paikern.backends.blocks import blocks_of, matrix_of
from paikern.backends.errors import refuse_nan

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_Row = tuple[int, int, tuple[int, ...], tuple[int, ...], bool, int, int, int, int]


def _dense(scores: Tensor, absolute: bool) -> _Row:
    kind, shape, strides = _TYPES[scores.dtype], tuple(scores.shape), scores.stride()
    return (scores.data_ptr(), kind, shape, strides, absolute, 0, 0, 0, 1)


def _factored(weight: Tensor, a: Tensor, g: Tensor, mask: Tensor, power: int) -> _Row:
    """`a`, `g` and `mask` must be contiguous and outlive the call."""
    row = _dense(weight, False)
    candidates = mask.data_ptr() if mask.numel() else 0
    return (*row[:5], a.data_ptr(), g.data_ptr(), candidates, power)


def _bits(numel: int) -> Tensor:
    return torch.empty((numel + 7) // 8, dtype=torch.uint8)


def _nm(
    operation: str, tensors: Sequence[Tensor], rows: list[_Row], n: int, m: int, dims: Sequence[int]
) -> list[Tensor]:
    bits = [_bits(t.numel()) for t in tensors]
    sources = [
        (row, t.shape[dim], math.prod(t.shape[dim + 1 :]), b.data_ptr())
        for row, t, dim, b in zip(rows, tensors, dims, bits, strict=True)
    ]
    refuse_nan(operation, _C.nm_mask(sources, n, m))
    return bits


def nm_mask(
    scores: Sequence[Tensor], n: int, m: int, dims: Sequence[int], absolute: bool
) -> list[Tensor]:
    return _nm("nm_mask", scores, [_dense(s, absolute) for s in scores], n, m, dims)


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
    left = [t.float().contiguous() for t in a]
    right = [t.float().contiguous() for t in g]
    candidates = [mask.contiguous() for mask in masks]
    rows = [
        _factored(w, x, y, mask, power)
        for w, x, y, mask in zip(weights, left, right, candidates, strict=True)
    ]
    return _nm("nm_mask_factored", weights, rows, n, m, dims)


def _means(operation: str, tensor: Tensor, row: _Row, block: Sequence[int]) -> Tensor:
    means = torch.empty(blocks_of(tensor.shape, block), dtype=torch.float64)
    columns = matrix_of(tensor.shape)[1]
    nan = _C.block_means(row, columns, block[0], block[1], means.data_ptr())
    refuse_nan(operation, 0 if nan else -1)
    return means


def block_means(scores: Tensor, block: Sequence[int], absolute: bool) -> Tensor:
    return _means("block_means", scores, _dense(scores, absolute), block)


def block_means_factored(
    weight: Tensor, a: Tensor, g: Tensor, mask: Tensor, block: Sequence[int], power: int
) -> Tensor:
    left, right, candidates = a.float().contiguous(), g.float().contiguous(), mask.contiguous()
    row = _factored(weight, left, right, candidates, power)
    return _means("block_means_factored", weight, row, block)


def expand_blocks(packed: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    rows, columns = matrix_of(shape)
    bits, blocks = _bits(rows * columns), packed.contiguous()
    _C.expand_blocks(blocks.data_ptr(), rows, columns, block[0], block[1], bits.data_ptr())
    return bits
