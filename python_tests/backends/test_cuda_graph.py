"""Replays, with stand-ins for CUDA: the first call runs, the second records, later ones replay."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paikern.backends.cuda_graph import Replay


class _Graph:
    def __init__(self) -> None:
        self.log: list[str] = log

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.log.append("begin")

    def capture_end(self) -> None:
        self.log.append("end")

    def replay(self) -> None:
        self.log.append("replay")


class _Context:
    def __init__(self, *given: object) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def wait_stream(self, other: object) -> None: ...


log: list[str] = []


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    log.clear()
    for name, value in (("CUDAGraph", _Graph), ("Stream", _Context), ("stream", _Context),
                        ("device_of", _Context), ("current_stream", _Context)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return SimpleNamespace(is_cuda=True)


def test_on_the_cpu_every_call_runs() -> None:
    calls: list[int] = []
    replay = Replay(lambda: calls.append(1), torch.zeros(1))
    for _ in range(3):
        replay()
    assert len(calls) == 3


def test_the_second_call_records_and_later_ones_replay(on_gpu: Any) -> None:
    replay = Replay(lambda: log.append("run"), on_gpu)
    for _ in range(4):
        replay()
    assert log == ["run", "begin", "run", "end", "replay", "replay", "replay"]
    assert replay.why == ""
    assert replay.note("rounds") == []


def test_what_cannot_be_recorded_goes_on_as_it_is(on_gpu: Any) -> None:
    recording = False

    def run() -> None:
        nonlocal recording
        recording = log[-1:] == ["begin"]
        log.append("run")
        if recording:
            assert not gc.isenabled()
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    replay = Replay(run, on_gpu)
    for _ in range(3):
        replay()
    assert log == ["run", "begin", "run", "end", "run", "run"]
    assert replay.why == "operation not permitted when stream is capturing"
    assert replay.note("rounds") == [f"rounds run without a CUDA graph, slower: {replay.why}"]
    assert gc.isenabled()


def test_an_interrupt_while_recording_is_passed_on(on_gpu: Any) -> None:
    def run() -> None:
        log.append("run")
        if log[-2:-1] == ["begin"]:
            raise KeyboardInterrupt

    replay = Replay(run, on_gpu)
    replay()
    with pytest.raises(KeyboardInterrupt):
        replay()
    assert log == ["run", "begin", "run", "end"]
    assert gc.isenabled()
