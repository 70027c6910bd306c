"""Saving masks: what a failure on the way leaves behind, and where a file goes."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from paikern import _maskfile
from paikern.masks import MaskSet, load_masks
from python_tests.mask_files import some_masks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "masks.safetensors"


class Faults:
    """Fails the n-th of the file operations that a save makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> None:
        self.calls: list[str] = []
        for name in ("open", "fsync", "replace", "close"):
            real = getattr(os, name)

            def wrapped(*args: Any, _name: str = name, _real: Any = real, **kwargs: Any) -> Any:
                self.calls.append(_name)
                if len(self.calls) == fail_at:
                    raise error
                return _real(*args, **kwargs)

            monkeypatch.setattr(_maskfile.os, name, wrapped)


def test_operations_of_a_save(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        faults = Faults(patched, 0, OSError())
        some_masks().save(path)
    # file: open, fsync, rename; folder: open, fsync, close
    assert faults.calls == ["open", "fsync", "replace", "open", "fsync", "close"]


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_save_changes_nothing(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    existing: bool,
    fail_at: int,
    error: BaseException,
) -> None:
    old = some_masks(seed=9)
    if existing:
        old.save(path)
    with monkeypatch.context() as patched:
        Faults(patched, fail_at, error)
        with pytest.raises(type(error)):
            some_masks().save(path)
    assert os.listdir(path.parent) == ([path.name] if existing else [])
    if existing:
        assert load_masks(path) == old
    some_masks().save(path)
    assert load_masks(path) == some_masks()


@pytest.mark.parametrize("fail_at", [4, 5])
def test_failure_after_the_rename_leaves_a_whole_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    with monkeypatch.context() as patched:
        Faults(patched, fail_at, OSError(5, "Input/output error"))
        with pytest.raises(OSError, match="Input/output"):
            some_masks().save(path)
    assert load_masks(path) == some_masks()
    assert os.listdir(path.parent) == [path.name]


def test_disk_full_while_writing(path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    some_masks(seed=9).save(path)
    big = MaskSet.from_bool({"w": torch.ones(1 << 20, dtype=torch.bool)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            big.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(path.parent) == [path.name]
    assert load_masks(path) == some_masks(seed=9)


def test_metadata_that_json_cannot_hold_leaves_no_file(path: Path) -> None:
    circular: list[Any] = []
    circular.append(circular)
    with pytest.raises(ValueError, match="Circular"):
        some_masks(bad=circular).save(path)
    with pytest.raises(ValueError, match="store less provenance"):
        some_masks(bad="x" * 100_000_001).save(path)
    assert os.listdir(path.parent) == []


def test_save_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        some_masks().save(tmp_path / "no" / "masks")
    assert os.listdir(tmp_path) == []


def test_save_over_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        some_masks().save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_save_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    some_masks(seed=9).save(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    some_masks().save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load_masks(tmp_path / "real") == some_masks()


def test_permissions_follow_the_umask(path: Path) -> None:
    previous = os.umask(0o027)
    try:
        some_masks().save(path)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_save_takes_strings(tmp_path: Path) -> None:
    some_masks().save(str(tmp_path / "masks"))
    assert load_masks(str(tmp_path / "masks")) == some_masks()
