"""Samples from a file, for `data=`: inputs, with labels where the file holds some."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paikern.loading import ModelLoadError, first_line, is_safetensors

__all__ = ["fit_samples", "load_samples"]

Samples = Tensor | tuple[Tensor, Tensor] | dict[str, Tensor]

_INPUTS = ("inputs", "data")
_LABELS = "labels"
_TOKENS = "input_ids"
_NEARLY_LABELS = ("label", "target", "targets", "y")


def load_samples(path: str | os.PathLike[str]) -> Samples:
    """What `path` holds in a form that `data=` takes, but for the dtype: see `fit_samples`.

    Args:
        path: a ``.npy`` array; or a ``.npz``, safetensors or ``torch.save`` file with ``inputs``
            (or ``data``, or one array of any name) and, for methods that differentiate a loss,
            ``labels``; or with ``input_ids`` and whatever else a transformer takes by name. What
            ``torch.save`` has written may also be a tensor or a pair (inputs, labels); it is read
            with ``weights_only=True``, and no other pickle is.

    Returns:
        Inputs `[n, ...]`, integers as int64 and floats as float32; a pair with labels `[n, ...]`;
        or a mapping of keyword inputs.

    Raises:
        ModelLoadError: the file cannot be read, or holds no such arrays, or of different lengths,
            or images of bytes: how they are scaled is for whoever has trained the model to say.

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
    if _TOKENS in held:
        _same_length(name, held)
        if held[_TOKENS].is_floating_point():
            raise ModelLoadError(
                f"data: {name} must hold token numbers as input_ids, got {held[_TOKENS].dtype}; "
                "save integers"
            )
        return {key: _numbers(value) for key, value in held.items()}
    known = next((key for key in _INPUTS if key in held), None)
    if known is None and len(held.keys() - {_LABELS}) == 1:
        known = next(iter(held.keys() - {_LABELS}))
    if known is None:
        raise ModelLoadError(
            f"data: {name} holds {len(held)} tensors and none is named 'inputs'{_listed(held)}; "
            "save 'inputs' and, where the method needs them, 'labels'"
        )
    found = held[known]
    if found.dim() < 2 or found.is_complex():
        raise ModelLoadError(
            f"data: {name} must hold numbers [n, ...], got {found.dtype} {list(found.shape)}"
        )
    if found.dtype == torch.uint8:
        raise ModelLoadError(
            f"data: {name} holds bytes {list(found.shape)}; save the floats that the model is "
            "trained on, for instance inputs.astype('float32') / 255"
        )
    if len(found) == 0:
        raise ModelLoadError(f"data: {name} holds no sample, inputs are {list(found.shape)}")
    if _LABELS in held:
        _same_length(name, {known: found, _LABELS: held[_LABELS]})
        return _numbers(found), _numbers(held[_LABELS])
    if nearly := [key for key in _NEARLY_LABELS if key in held and key != known]:
        raise ModelLoadError(
            f"data: {name} holds {nearly[0]!r} beside {known!r}; save the labels as 'labels'"
        )
    return _numbers(found)


def fit_samples(samples: Samples, model: nn.Module, example: Any) -> Samples:
    """`samples` in the dtypes that the model computes with.

    Floats become those of its weights. Integers stay where the model's own example input, if one is
    known, are integers too, and go by its name or without one; anywhere else they become floats.

    Args:
        samples: what `load_samples` returned.
        model: gives the dtype.
        example: an input of the model: a tensor, a mapping of keyword inputs, or None.

    Raises:
        ModelLoadError: floats for a model of token numbers.

    >>> fit_samples(torch.arange(6).view(2, 3), nn.Linear(3, 1).double(), None).dtype
    torch.float64
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def fitted(value: Tensor) -> Tensor:
        return value.to(dtype)

    word, own = _own_input(example)
    of_tokens = isinstance(own, Tensor) and own.dtype in (torch.int32, torch.int64)
    if isinstance(samples, dict) and of_tokens and word is None:
        ids, more = samples.get(_TOKENS), samples.keys() - {_TOKENS}
        if ids is not None and more <= {_LABELS}:  # the model takes them without a name
            samples = (ids, samples[_LABELS]) if more else ids
    if isinstance(samples, dict):
        return {
            key: fitted(value) if value.is_floating_point() and key != _LABELS else value
            for key, value in samples.items()
        }
    inputs, *labels = samples if isinstance(samples, tuple) else (samples,)
    if of_tokens:
        if inputs.is_floating_point():
            raise ModelLoadError(
                f"data: the model takes token numbers, got {inputs.dtype} {list(inputs.shape)}; "
                "save integers"
            )
        if word is not None:
            return {word: inputs, **dict(zip((_LABELS,), labels, strict=False))}
    else:
        inputs = fitted(inputs)
    return (inputs, labels[0]) if labels else inputs


def _own_input(example: Any) -> tuple[str | None, Any]:
    """The one input of an example, and its name where it has one."""
    if isinstance(example, Mapping) and len(example) == 1:
        return next(iter(example.items()))
    if isinstance(example, tuple) and len(example) == 1:
        return None, example[0]
    return None, example


def _read(path: Path) -> dict[str, Tensor]:
    name = os.fspath(path)
    if path.is_dir():
        raise ModelLoadError(f"data: {name} is a folder; give a file")
    if not path.is_file():
        raise ModelLoadError(f"data: there is no file {name}")
    if path.stat().st_size == 0:
        raise ModelLoadError(f"data: {name} is empty")
    try:
        held = _held(path)
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"data: {name} is damaged or holds more than tensors and is not unpickled; save arrays "
            "of numbers by numpy.savez, or tensors by torch.save"
        ) from error
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"data: {name} cannot be read ({first_line(error)}); give a .npy, .npz, safetensors or "
            "torch.save file of numbers, written to its end"
        ) from error
    return {key: _tensor(name, key, value) for key, value in _arrays(name, held).items()}


def _held(path: Path) -> Any:
    """What is in the file, by its first bytes: files get renamed."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(b"\x93NUMPY"):
        return {"inputs": _whole(path)}
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            saved_by_torch = any(entry.endswith("data.pkl") for entry in archive.namelist())
        if not saved_by_torch:
            with np.load(path, allow_pickle=False) as loaded:
                return {key: _objectless(loaded, key) for key in loaded}
    elif is_safetensors(path):
        from safetensors.torch import load_file

        return load_file(path)
    elif not start.startswith(b"\x80"):  # the oldest form of torch.save is a bare pickle
        raise ModelLoadError(
            f"data: {os.fspath(path)} cannot be read: it is no .npy, .npz, safetensors or "
            "torch.save file"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _whole(path: Path) -> np.ndarray[Any, Any]:
    """The array of a .npy file, which is mapped first: what its header claims need not be true."""
    try:
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:
        raise _of_objects(error) from error


def _objectless(loaded: Any, key: str) -> Any:
    try:
        return loaded[key]
    except ValueError as error:
        raise _of_objects(error) from error


def _of_objects(error: ValueError) -> Exception:
    """NumPy speaks of pickles and arrays in Python objects where numbers were asked for."""
    text = str(error).lower()
    if "pickle" in text or "object" in text:
        return ValueError("its arrays hold Python objects, which are not unpickled")
    return error


def _arrays(name: str, held: Any) -> Mapping[str, Any]:
    """Arrays by name; a pair is inputs and labels."""
    if isinstance(held, Tensor):
        return {"inputs": held}
    if isinstance(held, Mapping):
        return {str(key): value for key, value in held.items()}
    if isinstance(held, (tuple, list)) and len(held) == 2:
        return {"inputs": held[0], _LABELS: held[1]}
    raise ModelLoadError(
        f"data: {name} holds a {type(held).__name__}; save a tensor, a pair (inputs, labels) or a "
        "dict of tensors"
    )


def _tensor(name: str, key: str, value: Any) -> Tensor:
    """A plain tensor of `value`; numbers of any byte order will do."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ModelLoadError(
                f"data: {name} must hold plain tensors, {key!r} is of another kind; save "
                "value.to_dense() or value.dequantize()"
            )
        return value.detach()
    if not isinstance(value, np.ndarray):
        raise ModelLoadError(
            f"data: {name} must hold tensors, {key!r} is a {type(value).__name__}; convert with "
            "torch.as_tensor"
        )
    if value.dtype.kind not in "biufc":
        raise ModelLoadError(
            f"data: {name} cannot be read as numbers, {key!r} holds {value.dtype.name}; save class "
            "numbers or token numbers instead of text"
        )
    if value.dtype.itemsize > 8 and value.dtype.kind == "f":  # long double
        value = value.astype(np.float64)
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), copy=False))


def _numbers(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.long()


def _listed(held: Mapping[str, Tensor]) -> str:
    names = ", ".join(repr(key) for key in list(held)[:5])
    return f" but {names}" if held else ""


def _same_length(name: str, tensors: Mapping[str, Tensor]) -> None:
    lengths = {key: len(value) if value.dim() else 0 for key, value in tensors.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise ModelLoadError(f"data: {name} must hold as many of each, got {listed}")
