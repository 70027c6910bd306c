"""Mask files: round trips, other readers, hostile files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from paikern import _maskfile
from paikern.errors import MaskFormatError
from paikern.masks import MaskSet, load_masks
from paikern.version import __version__
from python_tests.mask_files import METADATA, some_masks

shape_lists = st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "masks.safetensors"


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], resign: bool = True) -> None:
    """Change the header of a mask file, with a provenance digest that fits again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    metadata = header.get("__metadata__")
    if resign and isinstance(metadata, dict):
        rest = {k: v for k, v in metadata.items() if k != "metadata_digest"}
        text = json.dumps(rest, sort_keys=True).encode()
        metadata["metadata_digest"] = hashlib.sha256(text).hexdigest()
    write_raw(path, header, data[8 + length :])


# --- round trips ---------------------------------------------------------------------------------


def test_round_trip(path: Path) -> None:
    masks = some_masks()
    masks.save(path)
    loaded = load_masks(path)
    assert loaded == masks
    assert list(loaded) == list(masks)
    assert {k: loaded.metadata[k] for k in METADATA} == METADATA
    assert loaded.metadata["sparsity_reached"] == masks.sparsity
    assert loaded.metadata["digest"] == masks.digest
    assert loaded.metadata["paikern_version"] == __version__
    assert loaded.metadata["torch_version"] == torch.__version__


@given(
    shape_lists,
    st.integers(0, 2**32),
    st.dictionaries(st.text(), json_values, max_size=4),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_of_anything(
    tmp_path: Path, shapes: list[tuple[int, ...]], seed: int, metadata: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = MaskSet.from_bool(
        {f"p{i}.{'x' * i}": torch.rand(s, generator=generator) < 0.5 for i, s in enumerate(shapes)},
        metadata,
    )
    target = tmp_path / "any.safetensors"
    masks.save(target)
    loaded = MaskSet.load(target)
    assert loaded == masks
    assert list(loaded) == list(masks)
    written = {"format", "format_version", "shapes", "digest", "metadata_digest"}
    written |= {"paikern_version", "torch_version", "sparsity_reached"}
    for key, value in metadata.items():
        if key not in written:
            assert loaded.metadata[key] == value
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert load_masks(again) == masks


@pytest.mark.parametrize("text", ["dpai", "3", "null", '"quoted"', "[1", "NaN", "", "0.5 ", "ä\n"])
def test_strings_stay_strings(path: Path, text: str) -> None:
    some_masks(note=text).save(path)
    assert load_masks(path).metadata["note"] == text


def test_metadata_beyond_json(path: Path) -> None:
    some_masks(dtype=torch.float16, history=[math.inf], sizes=(1, 2)).save(path)
    metadata = load_masks(path).metadata
    assert metadata["dtype"] == "torch.float16"
    assert metadata["history"] == [math.inf]
    assert metadata["sizes"] == [1, 2]


def test_size_is_an_eighth_of_a_byte_a_weight(path: Path) -> None:
    MaskSet.from_bool({"w": torch.ones(1000, 1001, dtype=torch.bool)}).save(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + math.ceil(1_001_000 / 8)
    assert header % 8 == 0
    assert header < 1000


def test_safetensors_reads_it(path: Path) -> None:
    masks = some_masks()
    masks.save(path)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(masks)
        for name in masks:
            assert torch.equal(file.get_tensor(name), masks.packed(name))
        metadata = file.metadata()
    assert metadata["format"] == "paikern-masks"
    assert metadata["format_version"] == "1"
    assert metadata["method"] == "dpai"
    assert metadata["sparsity"] == "0.75"
    assert json.loads(metadata["shapes"]) == {n: list(s) for n, s in masks.shapes.items()}


def test_same_masks_same_file(tmp_path: Path) -> None:
    some_masks().save(tmp_path / "a")
    some_masks().save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- hostile files -------------------------------------------------------------------------------


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match=r"none.*cannot be read \(No such file"):
        load_masks(tmp_path / "none")
    with pytest.raises(MaskFormatError, match="is no regular file"):
        load_masks(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MaskFormatError, match="is no regular file"):
        load_masks(tmp_path / "pipe")
    with pytest.raises(MaskFormatError, match="not a mask file"):
        load_masks("nul\0byte")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is 0 bytes long, too short"),
        (b"1234567", "is 7 bytes long, too short"),
        (b"\xff" * 8, "announces a header of 18446744073709551615 bytes, more than 100000000"),
        ((100_000_001).to_bytes(8, "little"), "announces a header of 100000001 bytes, more"),
        ((50).to_bytes(8, "little") + b"{}", "header of 50 bytes in a file of 10"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON header"),
        ((2).to_bytes(8, "little") + b"{}", "holds no paikern masks"),
        ((3).to_bytes(8, "little") + b"{x}", "JSONDecodeError while reading"),
        ((3).to_bytes(8, "little") + b'{"\xff', "UnicodeDecodeError while reading"),
        ((200_001).to_bytes(8, "little") + b'{"a":' + b"[" * 199_996, "while reading"),
        ((12).to_bytes(8, "little") + b'{"a":1,"a":1}'[:12], "while reading"),
        ((13).to_bytes(8, "little") + b'{"a":1,"a":1}', "names an entry twice"),
        ((9).to_bytes(8, "little") + b'{"a":NaN}', "has NaN in its header"),
        ((5_006).to_bytes(8, "little") + b'{"a":' + b"9" * 5_000 + b"}", "ValueError while"),
        (b"\x80\x02}q\x00." * 20, "announces a header of"),  # a pickle
    ],
)
def test_files_that_are_no_mask_files(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(MaskFormatError, match=message) as caught:
        load_masks(path)
    assert "masks.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def set_metadata(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"][key] = value

    return change


def set_shape(name: str, shape: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        shapes = json.loads(header["__metadata__"]["shapes"])
        shapes[name] = shape
        header["__metadata__"]["shapes"] = json.dumps(shapes)

    return change


def set_entry(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name].update(values)

    return change


def drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        *outer, last = keys
        for key in outer:
            header = header[key]
        del header[last]

    return change


def put(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("__metadata__"), "holds no paikern masks"),
        (put("__metadata__", 5), "holds no paikern masks"),
        (set_metadata("seed", 5), "holds no paikern masks"),
        (set_metadata("format", "pt"), "holds no paikern masks"),
        (set_metadata("format_version", "2"), "has format version '2', this paikern"),
        (drop("__metadata__", "format_version"), "has format version None"),
        (drop("__metadata__", "shapes"), "has no 'shapes'"),
        (drop("__metadata__", "digest"), "has no 'digest'"),
        (set_metadata("digest", "0" * 64), "digest does not match the masks"),
        (set_metadata("shapes", "[]"), "shapes that are no JSON object"),
        (set_metadata("shapes", "{"), "JSONDecodeError while reading"),
        (set_metadata("shapes", '{"odd": [7], "odd": [7]}'), "twice"),
        (set_shape("odd", 7), "'odd' a shape that is no list of sizes"),
        (set_shape("odd", [7.0]), "no list of sizes"),
        (set_shape("odd", [True]), "no list of sizes"),
        (set_shape("odd", [-7]), "no list of sizes"),
        (set_shape("odd", ["7"]), "no list of sizes"),
        (set_shape("odd", [1] * 65), "no list of sizes"),
        (set_shape("odd", [2**62, 2]), "a shape that is too large"),
        (set_shape("empty", [0, 2**62, 2**62]), "a shape that is too large"),
        (set_shape("odd", [9]), r"has shape \[1\] for 'odd' of shape \[9\], expected \[2\]"),
        (set_shape("odd", [6]), "has bits beyond the last weight|digest does not match"),
        (set_shape("odd", [2**40]), "has shape"),
        (set_shape("head.weight", [9, 5]), "digest does not match the masks"),
        (set_shape("new", [3]), "has 'new' among its masks or its shapes"),
        (drop("odd"), "has 'odd' among its masks or its shapes"),
        (put("more", {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "has 'more' among"),
        (put("odd", 3), "describes 'odd' wrongly"),
        (drop("odd", "dtype"), "describes 'odd' wrongly"),
        (set_entry("odd", extra=1), "describes 'odd' wrongly"),
        (set_entry("odd", dtype="F32"), "has dtype 'F32' for 'odd'"),
        (set_entry("odd", shape=[2]), r"has shape \[2\] for 'odd'"),
        (set_entry("odd", shape=[True]), r"has shape \[True\] for 'odd'"),
        (set_entry("odd", data_offsets=[0, 1]), "has data_offsets"),
        (set_entry("odd", data_offsets=[-1, 0]), "has data_offsets"),
        (set_entry("odd", data_offsets=[14, 2**70]), "has data_offsets"),
        (set_entry("odd", data_offsets=None), "has data_offsets None"),
    ],
)
def test_altered_headers(path: Path, change: Callable[..., None], message: str) -> None:
    some_masks().save(path)
    rewrite(path, change)
    with pytest.raises(MaskFormatError, match=message) as caught:
        load_masks(path)
    assert "\n" not in str(caught.value)


def test_rewriting_nothing_is_harmless(path: Path) -> None:
    some_masks().save(path)
    rewrite(path, lambda header: None)
    assert load_masks(path) == some_masks()


def test_altered_provenance(path: Path) -> None:
    some_masks().save(path)
    rewrite(path, set_metadata("sparsity", "0.5"), resign=False)
    with pytest.raises(MaskFormatError, match="provenance does not match its digest"):
        load_masks(path)


def test_spare_bits(path: Path) -> None:
    MaskSet.from_bool({"w": torch.ones(3, dtype=torch.bool)}).save(path)
    data = bytearray(path.read_bytes())
    data[-1] |= 0b1000
    path.write_bytes(data)
    with pytest.raises(MaskFormatError, match="bits beyond the last weight of 'w'"):
        load_masks(path)


@pytest.mark.parametrize("extra", [-1, 1, 1000])
def test_wrong_length(path: Path, extra: int) -> None:
    some_masks().save(path)
    data = path.read_bytes()
    path.write_bytes(data[:extra] if extra < 0 else data + bytes(extra))
    with pytest.raises(MaskFormatError, match="bytes of masks where the header promises"):
        load_masks(path)


def test_every_truncation(path: Path) -> None:
    some_masks().save(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(MaskFormatError):
            load_masks(path)


def test_max_bytes(path: Path) -> None:
    some_masks().save(path)
    size = sum(some_masks().packed(n).numel() for n in some_masks())
    with pytest.raises(MaskFormatError, match=f"holds {size} bytes of masks, more than max_bytes"):
        load_masks(path, max_bytes=size - 1)
    assert MaskSet.load(path, max_bytes=size) == some_masks()


def test_a_huge_sparse_file_takes_no_memory(path: Path) -> None:
    bits = 2**43
    shapes = json.dumps({"w": [bits]})
    metadata = {"format": "paikern-masks", "format_version": "1", "shapes": shapes, "digest": ""}
    text = json.dumps(metadata, sort_keys=True).encode()
    metadata["metadata_digest"] = hashlib.sha256(text).hexdigest()
    entry = {"dtype": "U8", "shape": [bits // 8], "data_offsets": [0, bits // 8]}
    write_raw(path, {"__metadata__": metadata, "w": entry}, b"")
    try:
        os.truncate(path, path.stat().st_size + bits // 8)
    except OSError:
        pytest.skip("the file system has no files of 1 TiB")
    with pytest.raises(MaskFormatError, match="more than max_bytes"):
        load_masks(path)


mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "swap", "zero"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 16),
    ),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, steps: list[tuple[str, float, int, int]]) -> bytes:
    changed = bytearray(data)
    for kind, where, value, length in steps:
        at = int(where * len(changed))
        if kind == "flip":
            changed[at] ^= value or 1
        elif kind == "set":
            changed[at] = value
        elif kind == "insert":
            changed[at:at] = bytes([value]) * length
        elif kind == "delete":
            del changed[at : at + length]
        elif kind == "swap":
            changed[at : at + 2 * length] = (
                changed[at + length : at + 2 * length] + changed[at : at + length]
            )
        else:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        if not changed:
            break
    return bytes(changed)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations)
def test_mutated_files(tmp_path: Path, steps: list[tuple[str, float, int, int]]) -> None:
    """Refused, or the mutation changed nothing that is read."""
    masks = some_masks()
    original = tmp_path / "original"
    if not original.exists():
        masks.save(original)
    target = tmp_path / "mutated"
    target.write_bytes(mutate(original.read_bytes(), steps))
    message = ""
    try:
        loaded = load_masks(target)
    except MaskFormatError as error:
        message = str(error)
    if message:
        assert "mutated" in message
        assert "\n" not in message
    else:
        assert loaded == masks
        assert loaded.metadata == load_masks(original).metadata


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(json_values, st.binary(max_size=40))
def test_any_json_as_header(tmp_path: Path, header: Any, data: bytes) -> None:
    target = tmp_path / "any"
    write_raw(target, header, data)
    with pytest.raises(MaskFormatError):
        load_masks(target)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["dtype", "shape", "data_offsets", "shapes", "digest", "x"]), json_values)
def test_any_json_inside_the_header(tmp_path: Path, key: str, value: Any) -> None:
    target = tmp_path / "inside"
    some_masks().save(target)
    if key in {"dtype", "shape", "data_offsets"}:
        rewrite(target, set_entry("odd", **{key: value}))
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        rewrite(target, set_metadata(key, text))
    try:
        loaded = load_masks(target)
    except MaskFormatError:
        return
    assert key == "x"
    assert loaded == some_masks()


def test_no_pickle_and_no_import_by_name() -> None:
    source = Path(_maskfile.__file__).read_text(encoding="utf-8")
    for word in ("torch.load", "import pickle", "importlib", "eval(", "exec("):
        assert word not in source
