"""Samples for the methods that read data: batches of inputs, with labels where there are any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a model is given at once.

    `inputs` is a tensor `[n, ...]`, or a mapping of keyword inputs (a tokenizer's, labels
    included); `targets` are the labels, or None.
    """

    inputs: Any
    targets: Any = None

    @property
    def size(self) -> int:
        """Number of samples."""
        if isinstance(self.inputs, Mapping):
            return next((len(v) for v in self.inputs.values() if _is_rows(v)), 0)
        return len(self.inputs)

    def without_labels(self) -> Batch:
        """The same batch without its targets and without "labels" among keyword inputs."""
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return Batch(inputs)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        return Batch(_moved(self.inputs, device), _moved(self.targets, device))


class Batches:
    """`data=` of `pk.prune` as batches, in any number of passes.

    Args:
        data: a tensor `[n, ...]`; a mapping of keyword inputs, as a tokenizer returns it; a pair
            (inputs, labels) of either and a tensor; or anything that can be iterated, a
            `DataLoader` for instance, and gives batches of any of these forms. A list of two
            tensors is a pair where the second is integer or has fewer dimensions, as labels do.
            What an iterator has given is kept in memory, as it can be read only once; it may be
            endless where a method reads a number of batches.
        size: tensors given whole are cut into batches of this many samples.
        labels: whether they are read; otherwise those of another number than the inputs are left
            out instead of refused.

    Iterating gives (inputs, labels or None) of floating-point tensors, for methods that compute
    with the inputs themselves; `samples` gives every form, for those that call the model.

    Raises:
        ValueError: not data, no sample, integer inputs where floats are needed, NaN or infinite
            values.

    Example:
        >>> import torch
        >>> [len(x) for x, _ in Batches((torch.ones(5, 3), torch.zeros(5)), size=2)]
        [2, 2, 1]
        >>> tokens = {"input_ids": torch.zeros(3, 7, dtype=torch.long)}
        >>> [batch.size for batch in Batches(tokens, size=2).samples()]
        [2, 1]
    """

    def __init__(self, data: Any, size: int = 128, labels: bool = True) -> None:
        given: Any = size
        if isinstance(given, bool) or not isinstance(given, Integral):
            raise ValueError(f"batch_size must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"batch_size must be >= 1, got {size}")
        if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
            raise ValueError(
                "data must be a tensor, an (inputs, labels) pair or an iterable of batches (a "
                f"DataLoader of a dataset), got {type(data).__name__}"
            )
        self._size = size
        self._whole = _whole(data, labels)
        if isinstance(data, Mapping) and self._whole is None:
            raise ValueError(
                "data: a mapping must hold the keyword inputs of the model as tensors [n, ...] of "
                f"one length, got {sorted(map(str, data))}"
            )
        self._finite = False  # whether a pass over data given whole has found all of it finite
        # An iterator gives its batches once, but every round needs them.
        if self._whole is None and isinstance(data, Iterator):
            data = _Remembered(data)
        self._data: Iterable[Any] = data

    @property
    def whole(self) -> bool:
        """Whether the data were given as tensors: reading them draws no random numbers."""
        return self._whole is not None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in self.samples():
            x = batch.inputs
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"data: this method reads tensors [n, ...], got {type(x).__name__}; pass the "
                    "tensor that the model computes with"
                )
            if not x.is_floating_point():
                way = "x.float() / 255 or as in training" if x.dtype == torch.uint8 else ".float()"
                raise ValueError(
                    f"data: inputs must be floating point, got {x.dtype}; convert with {way}"
                )
            yield x, batch.targets

    def samples(self) -> Iterator[Batch]:
        """One pass over the data; empty batches are left out."""
        empty = True
        for batch in self._raw():
            if batch.size == 0:
                continue
            empty = False
            if not self._finite:
                _check_finite(batch.inputs)
            yield batch
        if empty:
            raise ValueError("data: no sample was given; pass at least one batch")
        self._finite = self._whole is not None

    def example(self) -> Any:
        """The inputs of one sample, for methods that trace the model; labels are left out."""
        first = next(self.samples())
        return _rows(first.without_labels(), 0, 1).inputs

    def _raw(self) -> Iterator[Batch]:
        if self._whole is not None:
            whole = self._whole
            for start in range(0, whole.size, self._size):
                yield _rows(whole, start, start + self._size)
            return
        for item in self._data:
            batch = _batch(item)
            if batch is None:
                raise ValueError(
                    "data: a batch must be a tensor [n, ...], an (inputs, labels) pair or a "
                    f"mapping of keyword inputs, got {_kind(item)}"
                )
            yield batch


class _Remembered(Iterable[Any]):
    """The items of an iterator, read when they are first asked for."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self._read = items, []  # type: ignore[var-annotated]

    def __iter__(self) -> Iterator[Any]:
        at = 0
        while True:
            if at == len(self._read):
                try:
                    self._read.append(next(self._items))
                except StopIteration:
                    return
            yield self._read[at]
            at += 1


def _kind(item: Any) -> str:
    """What was given, in words; a way out where it is NumPy's."""
    found, kinds = type(item).__name__, [type(item).__name__]
    if isinstance(item, (tuple, list)) and item:
        kinds = [type(part).__name__ for part in item[:4]]
        found = f"a {found} of {', '.join(kinds)}"
    return f"{found}; convert with torch.from_numpy" if "ndarray" in kinds else found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # Tensors of inference mode cannot be saved for a backward pass.
        return value.to(device, copy=value.is_inference())
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    inputs = batch.inputs
    if isinstance(inputs, Mapping):
        inputs = {k: v[start:stop] if _is_rows(v) else v for k, v in inputs.items()}
    else:
        inputs = inputs[start:stop]
    return Batch(inputs, None if batch.targets is None else batch.targets[start:stop])


def _check_finite(inputs: Any) -> None:
    for x in inputs.values() if isinstance(inputs, Mapping) else (inputs,):
        if isinstance(x, Tensor) and x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ValueError("data: inputs hold NaN or infinite values; leave those samples out")


def _keywords(data: Mapping[Any, Any]) -> Batch | None:
    lengths = {len(v) for v in data.values() if _is_rows(v)}
    if len(lengths) != 1 or not all(isinstance(key, str) for key in data):
        return None
    return Batch(dict(data), data.get("labels"))


def _whole(data: Any, read: bool = True) -> Batch | None:
    """Data given whole: one tensor, inputs and labels, or keyword inputs; None for an iterable.

    `read` says that the labels are, and so have to be as many as the inputs.
    """
    if isinstance(data, Tensor):
        if data.dim() == 0:
            raise ValueError("data: a tensor must be [n, ...], got a scalar")
        return Batch(data)
    if isinstance(data, Mapping):
        return _keywords(data)
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return None
    x, y = data
    if isinstance(x, Mapping) and _is_rows(y):
        return _labelled(x, y, read)
    if not _is_rows(x) or not _is_rows(y):
        return None
    surely = not y.is_floating_point() or y.dim() < x.dim()
    if surely and isinstance(data, tuple) and len(x) != len(y):
        if not read:
            return Batch(x)
        raise ValueError(f"data: {len(x)} inputs and {len(y)} labels; give one label a sample")
    labels = isinstance(data, tuple) or surely
    return Batch(x, y) if labels and len(x) == len(y) else None


def _labelled(inputs: Mapping[Any, Any], labels: Tensor, read: bool) -> Batch | None:
    """Keyword inputs and their labels, given whole."""
    found = _keywords(inputs)
    if found is not None and found.size != len(labels):
        if not read:
            return Batch(found.inputs)
        raise ValueError(
            f"data: {found.size} inputs and {len(labels)} labels; give one label a sample"
        )
    return None if found is None else Batch(found.inputs, labels)


def _batch(item: Any) -> Batch | None:
    if isinstance(item, Tensor):
        return Batch(item) if item.dim() else None
    if isinstance(item, Mapping):
        return _keywords(item)
    if not isinstance(item, (tuple, list)) or not item:
        return None
    x, y = item[0], item[1] if len(item) > 1 else None
    if isinstance(x, Mapping):
        found = _keywords(x)
        return None if found is None else Batch(found.inputs, y if y is not None else found.targets)
    return Batch(x, y) if _is_rows(x) else None
