"""DPaI runs that are saved, interrupted and resumed."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from paikern.scorers import dpai_state, dpai_trainer


def net() -> nn.Module:
    return zoo.create("mlp", sizes=(12, 20, 16, 4), seed=0)


def run(state: Path | None, steps: int, **options: Any) -> pk.MaskSet:
    given = {"sparsity": 0.6, "progress": False, **options}
    return pk.prune(
        net(),
        "dpai",
        example_inputs=torch.ones(1, 12),
        apply=False,
        steps=steps,
        state=state,
        **given,
    )


def same(a: pk.MaskSet, b: pk.MaskSet) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


VARIANTS = [
    {"variant": "paper", "alpha": 0.5},
    {"variant": "published", "lr": 0.05},
    {"variant": "paper", "optimizer": "adam", "lr": 0.05},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("native", [True, False])
def test_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, options: dict[str, Any], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(dpai_trainer, "_native", lambda trainer: None)
    file = tmp_path / "run.safetensors"
    run(file, 7, **options)
    resumed = run(file, 40, **options)
    straight = run(None, 40, **options)
    assert same(resumed, straight)
    assert resumed.metadata["history"] == straight.metadata["history"]


@pytest.mark.parametrize("options", VARIANTS)
def test_interrupted_run_is_saved_and_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    file = tmp_path / "run.safetensors"

    def stop(done: int, total: int, values: dict[str, float]) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(file, 60, progress=stop, **options)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    seen: list[int] = []
    resumed = run(file, 60, progress=lambda done, total, values: seen.append(done), **options)
    assert seen == list(range(1, 61))
    assert same(resumed, run(None, 60, **options))


def test_a_step_broken_off_halfway_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpai_trainer, "_native", lambda trainer: None)
    file = tmp_path / "run.safetensors"
    run(file, 3)
    before = file.read_bytes()
    update = dpai_trainer.DPaITrainer._update
    calls = iter(range(100))

    def interrupted(*args: Any) -> tuple[int, int]:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(dpai_trainer.DPaITrainer, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(file, 30)
    assert file.read_bytes() == before


def test_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    first = run(file, 9)
    assert same(run(file, 9), first)


def test_saved_once_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpai_state, "_SAVE_EVERY_SECONDS", -1.0)
    file = tmp_path / "run.safetensors"
    there: list[bool] = []
    run(file, 5, progress=lambda done, total, values: there.append(file.exists()))
    assert there[0]


def test_patience_goes_on_counting(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    options: dict[str, Any] = {"alpha": 0.0, "lr": 1e-4}
    with pytest.warns(pk.PaikernWarning, match="stopped after") as told:
        straight = run(None, 500, patience=6, **options)
    stopped = int(str(told[0].message).split("after ")[1].split(" ")[0])
    run(file, stopped - 3, patience=6, **options)  # three unchanged steps are on record
    with pytest.warns(pk.PaikernWarning, match=f"stopped after {stopped} steps"):
        resumed = run(file, 500, patience=6, **options)
    assert same(resumed, straight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.3}, "was made with alpha=0.99, this run has alpha=0.3"),
        ({"seed": 4}, "was made with seed=0, this run has seed=4"),
        ({"variant": "published"}, "was made with variant='paper'"),
        ({"optimizer": "adam"}, "lr=0.1, this run has lr=0.005"),
        ({"sparsity": 0.5}, "other layers or another sparsity"),
        ({"steps": 2}, "has done 5 steps, more than steps=2"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "run.safetensors"
    run(file, 5)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        run(file, **{"steps": 8, **change})
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "mask file"])
def test_damaged_files_are_refused_and_kept(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "run.safetensors"
    masks = run(file, 3)
    content = file.read_bytes()
    if damage == "mask file":
        masks.save(file)
    else:
        file.write_bytes(
            {"cut": content[: len(content) // 2], "text": b"hello", "empty": b""}[damage]
        )
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is no saved run of this model and method"):
        run(file, 5)
    assert file.read_bytes() == before


@settings(max_examples=30, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(place: float, bit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.safetensors"
        run(file, 3)
        content = bytearray(file.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        file.write_bytes(content)
        with pytest.raises(ValueError, match="state: "):
            run(file, 5)


def test_another_network_or_start_is_refused(tmp_path: Path) -> None:
    """Names and shapes of the weights are the same, the paths are not."""
    file = tmp_path / "run.safetensors"
    options = {"sparsity": 0.5, "apply": False, "progress": False, "state": file, "steps": 3}

    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.chain = True

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).relu()) if self.chain else self.a(x) + self.b(x)
            return y

    model = Parallel()
    start = {n: torch.rand(6, 6) for n in ("a.weight", "b.weight")}
    pk.prune(model, "dpai", example_inputs=torch.ones(1, 6), init_scores=start, **options)
    other = {n: s + 0.1 for n, s in start.items()}
    with pytest.raises(ValueError, match="another init_scores"):
        pk.prune(model, "dpai", example_inputs=torch.ones(1, 6), init_scores=other, **options)
    model.chain = False
    with pytest.raises(ValueError, match="another network or input size"):
        pk.prune(model, "dpai", example_inputs=torch.ones(1, 6), init_scores=start, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3.5}, "steps must be an integer, got 3.5"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"patience": 2.5}, "patience must be an integer, got 2.5"),
        ({"lr": "a"}, "lr must be a number, got 'a'"),
        ({"beta": None}, "beta must be a number, got None"),
        ({"state": 5}, "state must be a file name or path, got 5"),
        ({"state": ""}, "state must be a file name or path, got ''"),
    ],
)
def test_options_of_the_wrong_type(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**{"state": None, "steps": 3, **change})


def test_folder_is_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"state: folder .* does not exist"):
        run(tmp_path / "missing" / "run.safetensors", 3)
    with pytest.raises(ValueError, match="is a folder"):
        run(tmp_path, 3)


def test_scores_on_disk_are_those_of_the_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = tmp_path / "run.safetensors"
    options = {"sparsity": 0.6, "steps": 6, "example_inputs": torch.ones(1, 12)}
    scores = pk.score(net(), "dpai", state=file, **options)
    saved: dict[str, Tensor] = load_file(file)
    for name in scores:
        assert torch.equal(saved[f"s.{name}"].abs(), scores.dense(name))


@contextlib.contextmanager
def no_callbacks_of_the_collector() -> Iterator[None]:
    """Hypothesis has one, and Python drops what is raised within it, the interrupt too."""
    held = gc.callbacks[:]
    gc.callbacks.clear()
    try:
        yield
    finally:
        gc.callbacks[:] = held


def test_sigint_within_a_native_call_loses_no_step(tmp_path: Path) -> None:
    net = pk.zoo.create("mlp", sizes=(64, 256, 10))
    options = {
        "sparsity": 0.9,
        "example_inputs": torch.ones(1, 64),
        "optimizer": "adam",
        "apply": False,
        "progress": False,
    }
    file = tmp_path / "run.safetensors"
    pk.prune(
        net, "dpai", steps=1, **options
    )  # else the signal may meet the first trace, not a step
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    timer = threading.Timer(0.35, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with no_callbacks_of_the_collector(), pytest.raises(KeyboardInterrupt):
        pk.prune(net, "dpai", steps=10**7, state=file, **options)
    with safe_open(file, framework="pt") as saved:
        done = json.loads(saved.metadata()["paikern"])["steps"]
    assert done > 0
    straight = tmp_path / "straight.safetensors"
    pk.prune(net, "dpai", steps=done, state=straight, **options)
    assert file.read_bytes() == straight.read_bytes()
