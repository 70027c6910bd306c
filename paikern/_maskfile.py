"""Mask files: safetensors with packed bits as values, provenance in the header, no pickle.

Layout: 8 bytes header length (little-endian), a JSON header, the packed bits of all masks one after
the other. A mask's header entry holds ``"dtype": "U8"``, ``"shape": [bytes]`` and
``"data_offsets": [from, to]``. ``__metadata__`` maps strings to strings: a value that is no string
is stored as JSON, and so is a string that would read back as JSON.

Reading trusts nothing: every length is checked before memory is taken for it, and whatever is wrong
becomes a ``MaskFormatError`` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from paikern._files import replacing
from paikern.errors import MaskFormatError
from paikern.version import __version__

FORMAT = "paikern-masks"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000
MAX_DATA_BYTES = 16 << 30  # bits of 1.4e11 weights
_MAX_DIMENSIONS = 64

Shapes = Mapping[str, Sequence[int]]


def digest(packed: Mapping[str, Tensor], shapes: Shapes) -> str:
    """sha256 over names, shapes and bits, whatever the order of the names."""
    total = hashlib.sha256()
    for name in sorted(packed):
        total.update(json.dumps([name, list(shapes[name])]).encode())
        total.update(raw_bytes(packed[name]))
    return total.hexdigest()


def raw_bytes(packed: Tensor) -> memoryview:
    """The bytes of a packed mask, not copied if it is on the CPU."""
    return packed.detach().cpu().contiguous().numpy().data


# --- writing -------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    packed: Mapping[str, Tensor],
    shapes: Shapes,
    metadata: Mapping[str, Any],
) -> None:
    """Write atomically: whoever reads ``path`` sees the old file or the whole new one.

    Raises:
        OSError: as the file system says; ``path`` is then as it was and no other file is left.
    """
    header = _header(packed, shapes, metadata)
    with replacing(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for mask in packed.values():
            file.write(raw_bytes(mask))


def _header(packed: Mapping[str, Tensor], shapes: Shapes, metadata: Mapping[str, Any]) -> bytes:
    provenance = {str(key): _encode(value) for key, value in metadata.items()}
    provenance |= {"paikern_version": __version__, "torch_version": str(torch.__version__)}
    reserved = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "shapes": json.dumps({name: list(shapes[name]) for name in packed}),
        "digest": digest(packed, shapes),
    }
    everything = provenance | reserved
    everything["metadata_digest"] = _metadata_digest(everything)
    entries: dict[str, Any] = {"__metadata__": everything}
    offset = 0
    for name, mask in packed.items():
        end = offset + mask.numel()
        entries[name] = {"dtype": "U8", "shape": [mask.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"metadata: the header would be {len(text)} bytes, more than {MAX_HEADER_BYTES}; "
            "store less provenance"
        )
    return text


def _encode(value: Any) -> str:
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value, default=str)


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    rest = {key: value for key, value in metadata.items() if key != "metadata_digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------


def read(
    path: str | os.PathLike[str], max_bytes: int = MAX_DATA_BYTES
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], dict[str, Any]]:
    """``(packed, shapes, metadata)`` of a mask file, checked to the last bit.

    Raises:
        MaskFormatError: whatever is wrong with the path or the file.
    """
    try:
        return _read(path, max_bytes)
    except MaskFormatError as error:
        raise MaskFormatError(f"{os.fspath(path)!r}: {error}") from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise MaskFormatError(
            f"{os.fspath(path)!r}: cannot be read ({why}); check the path"
        ) from error
    # json recurses, converts long integers and decodes text: each has an error of its own.
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise MaskFormatError(
            f"{os.fspath(path)!r}: not a mask file ({type(error).__name__} while reading); "
            "write it again with MaskSet.save"
        ) from error


def _read(
    path: str | os.PathLike[str], max_bytes: int
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], dict[str, Any]]:
    # Opening a pipe would wait for a writer, so the kind of file is looked at first.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise MaskFormatError("is no regular file; give the path of a mask file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = _read_header(file, size)
        metadata = _check_metadata(header.pop("__metadata__", None))
        shapes = _check_shapes(metadata)
        lengths = _check_entries(header, shapes)
        total = sum(lengths.values())
        start = file.tell()
        if start + total != size:
            raise MaskFormatError(
                f"holds {size - start} bytes of masks where the header promises {total}; it is "
                "truncated or altered"
            )
        if total > max_bytes:
            raise MaskFormatError(
                f"holds {total} bytes of masks, more than max_bytes={max_bytes}; raise it if you "
                "trust the file"
            )
        data = bytearray(total)
        if file.readinto(data) != total:
            raise MaskFormatError("became shorter while it was read; try again")
    packed = _split(data, lengths, shapes)
    if digest(packed, shapes) != metadata["digest"]:
        raise MaskFormatError("the digest does not match the masks; the file was altered")
    hidden = ("format", "format_version", "shapes", "metadata_digest")
    provenance = {key: _decode(text) for key, text in metadata.items() if key not in hidden}
    return packed, shapes, provenance


def _read_header(file: BinaryIO, size: int) -> dict[str, Any]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise MaskFormatError(f"is {size} bytes long, too short for a mask file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise MaskFormatError(
            f"announces a header of {length} bytes, more than {MAX_HEADER_BYTES}; not a mask file"
        )
    if length > size - 8:
        raise MaskFormatError(
            f"announces a header of {length} bytes in a file of {size}; it is truncated or no "
            "mask file"
        )
    text = file.read(length)
    if not text.startswith(b"{"):
        raise MaskFormatError("has no JSON header; not a safetensors file")
    header = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(header, dict):
        raise MaskFormatError("has a header that is no JSON object; not a safetensors file")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MaskFormatError("names an entry twice in its header; the file was altered")
    return found


def _no_constant(text: str) -> None:
    raise MaskFormatError(f"has {text} in its header; not a safetensors file")


def _check_metadata(metadata: Any) -> dict[str, str]:
    if (
        not isinstance(metadata, dict)
        or not all(isinstance(value, str) for value in metadata.values())
        or metadata.get("format") != FORMAT
    ):
        raise MaskFormatError("holds no paikern masks; write masks with MaskSet.save")
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise MaskFormatError(
            f"has format version {_shown(version)}, this paikern {__version__} reads "
            f"{FORMAT_VERSION}; install a version that matches"
        )
    for key in ("shapes", "digest", "metadata_digest"):
        if key not in metadata:
            raise MaskFormatError(f"has no '{key}' in its header; the file was altered")
    if _metadata_digest(metadata) != metadata["metadata_digest"]:
        raise MaskFormatError("the provenance does not match its digest; the file was altered")
    return metadata


def _check_shapes(metadata: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    shapes = json.loads(metadata["shapes"], object_pairs_hook=_unique)
    if not isinstance(shapes, dict):
        raise MaskFormatError("has shapes that are no JSON object; the file was altered")
    for name, shape in shapes.items():
        if not _is_list_of_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise MaskFormatError(f"gives {_shown(name)} a shape that is no list of sizes")
        # A zero would hide any other size from the byte count, but not from torch's strides.
        if math.prod(max(size, 1) for size in shape) >= 2**63:
            raise MaskFormatError(f"gives {_shown(name)} a shape that is too large")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _check_entries(
    header: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Bytes of each mask, in the order of the data."""
    if set(header) != set(shapes):
        name = min(set(header) ^ set(shapes))
        raise MaskFormatError(f"has {_shown(name)} among its masks or its shapes, but not in both")
    lengths: dict[str, int] = {}
    offset = 0
    for name, entry in header.items():
        length = (math.prod(shapes[name]) + 7) // 8
        expected = {"dtype": "U8", "shape": [length], "data_offsets": [offset, offset + length]}
        if not isinstance(entry, dict) or set(entry) != set(expected):
            raise MaskFormatError(f"describes {_shown(name)} wrongly; the file was altered")
        for key, value in expected.items():
            # True == 1 in Python, so the types are compared as well.
            if repr(entry[key]) != repr(value):
                raise MaskFormatError(
                    f"has {key} {_shown(entry[key])} for {_shown(name)} of shape "
                    f"{list(shapes[name])}, expected {value}"
                )
        lengths[name] = length
        offset += length
    return lengths


def _is_list_of_sizes(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _split(
    data: bytearray, lengths: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    offset = 0
    for name, length in lengths.items():
        spare = -math.prod(shapes[name]) % 8
        if length and data[offset + length - 1] >> (8 - spare):
            raise MaskFormatError(f"has bits beyond the last weight of {_shown(name)}")
        if length:
            packed[name] = torch.frombuffer(data, dtype=torch.uint8, count=length, offset=offset)
        else:
            packed[name] = torch.empty(0, dtype=torch.uint8)
        offset += length
    return packed


def _shown(value: Any) -> str:
    """One short line, whatever the file put there."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
