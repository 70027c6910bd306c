"""Samples for the methods that read data: batches of inputs, with labels where there are any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor | None]


class Batches:
    """`data=` of `pk.prune` as (inputs, labels or None) pairs, in any number of passes.

    Args:
        data: a tensor `[n, ...]`; a pair (inputs, labels) of tensors; or anything that can be
            iterated, a `DataLoader` for instance, and gives batches of either form. A list of two
            tensors is a pair where the second is integer or has fewer dimensions, as labels do. An
            iterator, which can be read only once, is read into memory first.
        size: tensors given whole are cut into batches of this many samples.

    Raises:
        ValueError: not data, no sample, integer inputs, or NaN or infinite values.

    Example:
        >>> import torch
        >>> [len(x) for x, _ in Batches((torch.ones(5, 3), torch.zeros(5)), size=2)]
        [2, 2, 1]
    """

    def __init__(self, data: Any, size: int = 128) -> None:
        if size < 1:
            raise ValueError(f"batch_size must be >= 1, got {size}")
        if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
            raise ValueError(
                "data must be a tensor, an (inputs, labels) pair or an iterable of batches, "
                f"got {type(data).__name__}"
            )
        self._size = size
        self._whole = _pair(data)
        self._finite = False  # whether a pass over data given whole has found all of it finite
        # An iterator gives its batches once, but every round needs them.
        one_shot = self._whole is None and iter(data) is data
        self._data: Iterable[Any] = list(data) if one_shot else data

    def __iter__(self) -> Iterator[Batch]:
        empty = True
        for x, y in self._raw():
            if len(x) == 0:
                continue
            empty = False
            if not x.is_floating_point():
                raise ValueError(
                    f"data: inputs must be floating point, got {x.dtype}; convert with .float()"
                )
            if not self._finite and not bool(torch.isfinite(x).all()):
                raise ValueError(
                    "data: inputs hold NaN or infinite values; leave those samples out"
                )
            yield x, y
        if empty:
            raise ValueError("data: no sample was given; pass at least one batch")
        self._finite = self._whole is not None

    def _raw(self) -> Iterator[Batch]:
        if self._whole is not None:
            x, y = self._whole
            for start in range(0, len(x), self._size):
                stop = start + self._size
                yield x[start:stop], None if y is None else y[start:stop]
            return
        for batch in self._data:
            pair = (batch, None) if isinstance(batch, Tensor) else _first_two(batch)
            if pair is None or pair[0].dim() == 0:
                raise ValueError(
                    "data: a batch must be a tensor [n, ...] or an (inputs, labels) pair, "
                    f"got {type(batch).__name__}"
                )
            yield pair


def _pair(data: Any) -> Batch | None:
    """Data given whole: one tensor, or inputs and labels; None for an iterable of batches."""
    if isinstance(data, Tensor):
        if data.dim() == 0:
            raise ValueError("data: a tensor must be [n, ...], got a scalar")
        return data, None
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return None
    x, y = data
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or not x.dim() or not y.dim():
        return None
    labels = isinstance(data, tuple) or not y.is_floating_point() or y.dim() < x.dim()
    return (x, y) if labels and len(x) == len(y) else None


def _first_two(batch: Any) -> Batch | None:
    if not isinstance(batch, (tuple, list)) or not batch or not isinstance(batch[0], Tensor):
        return None
    y = batch[1] if len(batch) > 1 else None
    return batch[0], y if isinstance(y, Tensor) else None
