"""Files of one packed weight: safetensors with the entries `values` and `mask`, no pickle.

``__metadata__`` holds the format, its version, the dense shape as JSON and a digest of everything.
Reading trusts nothing, see `paikern._maskfile`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from typing import Any

import torch
from torch import Tensor

from paikern._files import replacing
from paikern._maskfile import _read_header, _shown, raw_bytes
from paikern.errors import MaskFormatError
from paikern.version import __version__

FORMAT = "paikern-weight"
FORMAT_VERSION = "1"
MAX_DATA_BYTES = 16 << 30
MAX_DIMENSIONS = 8
_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write(
    path: str | os.PathLike[str], values: Tensor, mask: Tensor, shape: tuple[int, ...]
) -> None:
    value_bytes, mask_bytes = raw_bytes(values.view(torch.uint8)), raw_bytes(mask)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shape": json.dumps(list(shape)),
        "digest": _digest(shape, _NAMES[values.dtype], value_bytes, mask_bytes),
        "paikern_version": __version__,
    }
    middle, end = values.nbytes, values.nbytes + mask.nbytes
    header = {
        "__metadata__": metadata,
        "values": _entry(_NAMES[values.dtype], values.numel(), 0, middle),
        "mask": _entry("U8", mask.numel(), middle, end),
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        file.write(value_bytes)
        file.write(mask_bytes)


def _entry(dtype: str, count: int, first: int, last: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [count], "data_offsets": [first, last]}


def _digest(shape: tuple[int, ...], dtype: str, values: Any, mask: Any) -> str:
    total = hashlib.sha256(json.dumps([list(shape), dtype]).encode())
    total.update(values)
    total.update(mask)
    return total.hexdigest()


def read(path: str | os.PathLike[str], max_bytes: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Values, packed mask and dense shape.

    Raises:
        MaskFormatError: whatever is wrong with the path or the file.
    """
    name = repr(os.fspath(path))
    try:
        return _read(path, max_bytes)
    except MaskFormatError as error:
        raise MaskFormatError(f"{name}: {error}") from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise MaskFormatError(f"{name}: cannot be read ({why}); check the path") from error
    # json recurses, converts long integers and decodes text: each has an error of its own.
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise MaskFormatError(
            f"{name}: not a packed weight ({type(error).__name__} while reading); write it again "
            "with PackedWeight.save"
        ) from error


def _read(path: str | os.PathLike[str], max_bytes: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    # Opening a pipe would wait for a writer, so the kind of file is looked at first.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise MaskFormatError("is no regular file; give the path of a packed weight")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(file, size)
        metadata = header.pop("__metadata__", None)
        shape = _check_metadata(metadata)
        dtype, kept = _check_entries(header, shape)
        held = kept * dtype.itemsize
        total = held + (math.prod(shape) + 7) // 8
        if file.tell() + total != size:
            raise MaskFormatError(
                f"holds {size - file.tell()} bytes where the header promises {total}; it is "
                "truncated or altered"
            )
        if total > max_bytes:
            raise MaskFormatError(
                f"holds {total} bytes, more than max_bytes={max_bytes}; raise it if you trust the "
                "file"
            )
        data = bytearray(total)
        if file.readinto(data) != total:
            raise MaskFormatError("became shorter while it was read; try again")
    view = memoryview(data)
    if _digest(shape, _NAMES[dtype], view[:held], view[held:]) != metadata["digest"]:
        raise MaskFormatError("the digest does not match the values; the file was altered")
    values = (
        torch.frombuffer(data, dtype=dtype, count=kept) if kept else torch.empty(0, dtype=dtype)
    )
    mask = (
        torch.frombuffer(data, dtype=torch.uint8, offset=held)
        if total > held
        else torch.empty(0, dtype=torch.uint8)
    )
    return values.clone(), mask.clone(), shape


def _check_metadata(metadata: Any) -> tuple[int, ...]:
    if (
        not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
        or metadata.get("format") != FORMAT
    ):
        raise MaskFormatError("holds no packed weight; write one with PackedWeight.save")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise MaskFormatError(
            f"has format version {_shown(metadata.get('format_version'))}, this paikern "
            f"{__version__} reads {FORMAT_VERSION}; install a version that matches"
        )
    if "shape" not in metadata or "digest" not in metadata:
        raise MaskFormatError("has no shape or digest in its header; the file was altered")
    shape = json.loads(metadata["shape"])
    if (
        not isinstance(shape, list)
        or not 2 <= len(shape) <= MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 2**40 for size in shape)
    ):
        raise MaskFormatError(
            f"has the shape {_shown(metadata['shape'])}, expected two sizes or more"
        )
    return tuple(shape)


def _check_entries(header: dict[str, Any], shape: tuple[int, ...]) -> tuple[torch.dtype, int]:
    if set(header) != {"values", "mask"}:
        raise MaskFormatError("must hold the entries 'values' and 'mask' and no others")
    found = header["values"]
    if not isinstance(found, dict) or found.get("dtype") not in _DTYPES:
        raise MaskFormatError(f"describes its values wrongly: {_shown(found)}")
    dtype, sizes = _DTYPES[found["dtype"]], found.get("shape")
    if (
        not isinstance(sizes, list)
        or len(sizes) != 1
        or type(sizes[0]) is not int
        or not 0 <= sizes[0] <= math.prod(shape)
    ):
        raise MaskFormatError(f"has {_shown(sizes)} values for the shape {list(shape)}")
    kept, bits = sizes[0], (math.prod(shape) + 7) // 8
    middle = kept * dtype.itemsize
    expected = {
        "values": _entry(found["dtype"], kept, 0, middle),
        "mask": _entry("U8", bits, middle, middle + bits),
    }
    for name, entry in expected.items():
        # True == 1 in Python, so the types are compared as well.
        if json.dumps(header[name], sort_keys=True) != json.dumps(entry, sort_keys=True):
            raise MaskFormatError(f"describes its {name} wrongly: {_shown(header[name])}")
    return dtype, kept
