"""Samples from a file, for `data=`: inputs, with labels where the file holds some."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paikern.loading import ModelLoadError, first_line, is_safetensors

__all__ = ["load_samples"]

Samples = Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]

_INPUTS = ("inputs", "data")
_LABELS = "labels"


def load_samples(path: str | os.PathLike[str]) -> Samples:
    """What `path` holds in a form that `data=` takes.

    Args:
        path: a ``.npy`` array; or a ``.npz`` or safetensors file with ``inputs`` (or ``data``, or
            one array of any name) and, for methods that differentiate a loss, ``labels``; or with
            ``input_ids`` and whatever else a transformer takes by name. Nothing is unpickled.

    Returns:
        Inputs `[n, ...]` in float32; a pair with labels `[n, ...]`, integers as int64 and floats as
        float32; or a mapping of keyword inputs, integers as int64.

    Raises:
        ModelLoadError: the file cannot be read, or holds no such arrays, or of different lengths.

    >>> import tempfile, pathlib, numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "samples.npz")
    ...     numpy.savez(file, inputs=numpy.zeros((20, 3, 32, 32)), labels=numpy.arange(20) % 10)
    ...     inputs, labels = load_samples(file)
    >>> tuple(inputs.shape), labels.dtype
    ((20, 3, 32, 32), torch.int64)
    """
    name = os.fspath(path)
    held = _read(Path(path))
    if "input_ids" in held:
        _same_length(name, held)
        return {key: _numbers(value) for key, value in held.items()}
    known = next((key for key in _INPUTS if key in held), None)
    if known is None and len(held.keys() - {_LABELS}) == 1:
        known = next(iter(held.keys() - {_LABELS}))
    if known is None:
        raise ModelLoadError(
            f"data: {name} holds {len(held)} tensors and none is named 'inputs'; save 'inputs' "
            "and, where the method needs them, 'labels'"
        )
    found = held[known]
    if found.dim() < 2 or found.is_complex():
        raise ModelLoadError(
            f"data: {name} must hold numbers [n, ...], got {found.dtype} {list(found.shape)}"
        )
    if _LABELS not in held:
        return found.float()
    _same_length(name, {known: found, _LABELS: held[_LABELS]})
    return found.float(), _numbers(held[_LABELS])


def _read(path: Path) -> dict[str, Tensor]:
    name = os.fspath(path)
    if not path.is_file():
        raise ModelLoadError(f"data: there is no file {name}")
    try:
        if is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return {key: torch.from_numpy(loaded[key]) for key in loaded}
        return {"inputs": torch.from_numpy(loaded)}
    except Exception as error:
        raise ModelLoadError(
            f"data: {name} cannot be read ({first_line(error)}); give a .npy or .npz file of "
            "numbers, or a safetensors file"
        ) from error


def _numbers(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.long()


def _same_length(name: str, tensors: Mapping[str, Tensor]) -> None:
    lengths = {key: len(value) if value.dim() else 0 for key, value in tensors.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise ModelLoadError(f"data: {name} must hold as many of each, got {listed}")
