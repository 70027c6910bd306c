"""Layers as the CUDA kernels of selection read them: rows of eight-byte numbers (scores.cuh)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TYPES", "Layer", "dense", "factored", "path_layer", "product"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DENSE, _PRODUCT, _FACTORED, _MAPS = range(4)


class Layer(NamedTuple):
    """One layer: what its scores are made of, kept alive with it, and where its mask goes."""

    source: int
    data: Tensor
    bits: Tensor | None = None
    other: Tensor | None = None
    g: Tensor | None = None
    candidates: Tensor | None = None
    absolute: bool = False
    power: int = 1
    columns: int = 1
    geometry: tuple[int, ...] = ()
    inside: Tensor | None = None

    def row(self, first: int, tile: int, geometry: int) -> tuple[int, ...]:
        """The fields of PaikernLayer, in its order; `geometry` is the address of the numbers."""
        return (
            first,
            self.data.numel(),
            tile,
            self.source,
            TYPES[self.data.dtype],
            self.data.data_ptr(),
            0 if self.other is None else TYPES[self.other.dtype],
            _address(self.other),
            _address(self.g),
            _address(self.candidates),
            _address(self.bits),
            int(self.absolute),
            self.power,
            self.columns,
            geometry,
            _address(self.inside),
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def bits_for(tensor: Tensor) -> Tensor:
    return tensor.new_empty((tensor.numel() + 7) // 8, dtype=torch.uint8)


def _candidates(masks: Sequence[Tensor], count: int) -> Iterator[Tensor | None]:
    """Packed masks, None where all weights are candidates."""
    if not masks:
        yield from (None,) * count
    yield from (mask.contiguous() if mask.numel() else None for mask in masks)


def _narrow(tensor: Tensor) -> Tensor:
    """As the kernels read it: float64 is rounded to float32, as the operations say."""
    held = tensor.detach().contiguous()
    return held.float() if held.dtype == torch.float64 else held


def dense(scores: Sequence[Tensor], masks: Sequence[Tensor], absolute: bool, emit: bool = True
) -> list[Layer]:  # fmt: skip
    return [
        Layer(_DENSE, s.detach().contiguous(), bits_for(s) if emit else None, candidates=c,
              absolute=absolute)
        for s, c in zip(scores, _candidates(masks, len(scores)), strict=True)
    ]  # fmt: skip


def product(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], masks: Sequence[Tensor]
) -> list[Layer]:
    return [
        Layer(_PRODUCT, _narrow(w), bits_for(w), other=_narrow(g), candidates=c)
        for w, g, c in zip(weights, gradients, _candidates(masks, len(weights)), strict=True)
    ]  # fmt: skip


def factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    power: int,
    convs: Sequence[int],
) -> list[Layer]:
    shapes = iter(convs)
    layers = []
    kept = _candidates(masks, len(weights))
    for w, x, y, candidates in zip(weights, a, g, kept, strict=True):
        maps = x.dim() > 1
        layers.append(
            Layer(
                _MAPS if maps else _FACTORED,
                _narrow(w),
                bits_for(w),
                other=x.detach().float().contiguous(),
                g=y.detach().float().contiguous(),
                candidates=candidates,
                power=power,
                columns=max(1, prod(w.shape[1:])),
                geometry=geometry(w, x, y, shapes) if maps else (),
            )
        )
    return layers


def one_vector(numbers: Sequence[int]) -> bool:
    """Whether a product is one of a matrix with one vector, see pk_one_vector (path.cuh)."""
    ones = (*numbers[:1], *numbers[3:10], *numbers[19:])
    return all(n == 1 for n in ones) and not any(numbers[13:16])


def path_layer(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    numbers: tuple[int, ...],
    power: int,
    candidates: Tensor,
    bits: Tensor,
) -> Layer:
    """Scores of a stored matrix from the maps of its columns and rows, where these lie for good.

    `numbers` is its geometry; all tensors are contiguous.
    """
    vectors = one_vector(numbers)
    return Layer(
        _FACTORED if vectors else _MAPS,
        weight,
        bits,
        other=x,
        g=g,
        candidates=candidates,
        power=power,
        columns=max(1, prod(weight.shape[1:])),
        geometry=() if vectors else numbers,
    )


def geometry(weight: Tensor, x: Tensor, g: Tensor, convs: Iterator[int]) -> tuple[int, ...]:
    """Batch, rows, channels, groups; size, kernel, stride, padding, dilation, out, three each."""
    axes = weight.dim() - 2
    stride, padding, dilation = (tuple(islice(convs, axes)) for _ in range(3))
    groups = next(convs) if axes else 1
    parts = (
        (x.shape[2:], 1),
        (weight.shape[2:], 1),
        (stride, 1),
        (padding, 0),
        (dilation, 1),
        (g.shape[2:], 1),
    )
    spatial = (n for values, fill in parts for n in (*(fill,) * (3 - axes), *values))
    return (x.shape[0], weight.shape[0], x.shape[1], groups, *spatial)
