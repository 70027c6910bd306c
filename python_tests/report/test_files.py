"""Files appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from paikern.report import write_atomically, write_json
from paikern.report.files import to_json


def test_text_and_bytes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.txt", "größe\n")
    assert (tmp_path / "a.txt").read_bytes() == "größe\n".encode()
    write_atomically(tmp_path / "a.txt", b"\x00\x01")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00\x01"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_keeps_being_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "a.txt", "x")


def test_json_is_strict(tmp_path: Path) -> None:
    value = {"inf": -math.inf, "nan": [math.nan, (1.5, 2)], 3: "x", "path": tmp_path}
    write_json(tmp_path / "a.json", value)

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {"inf": None, "nan": [None, [1.5, 2]], "3": "x", "path": str(tmp_path)}
    assert to_json([True, None]) == "[\n  true,\n  null\n]"
