"""DPaI steps from a table of instructions: the masks and the history of the native loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern.backends.cuda_graph import Replay
from paikern.errors import PaikernError
from paikern.scorers import dpai_device
from python_tests.cuda_source.test_device_loop import NETS, differing

pytestmark = pytest.mark.cuda_source


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dpai_device.DeviceSteps]:
    """The runs by device steps, so that a test knows there were any."""
    found: list[dpai_device.DeviceSteps] = []
    prepare = dpai_device.DeviceSteps.__init__

    def noted(self: dpai_device.DeviceSteps, trainer: Any) -> None:
        found.append(self)
        prepare(self, trainer)

    monkeypatch.setattr(dpai_device.DeviceSteps, "__init__", noted)
    return found


def run(net: nn.Module, x: Tensor, backend: str | None = None, **options: Any) -> pk.MaskSet:
    options = {"sparsity": 0.8, "example_inputs": x, "apply": False, "steps": 6, **options}
    return pk.prune(net, "dpai", backend=backend, **options)


@pytest.mark.filterwarnings("ignore:layer collapse")
@pytest.mark.filterwarnings("ignore:.*is left out")
@pytest.mark.parametrize("optimizer", ["ascent", "adam"])
@pytest.mark.parametrize("name", NETS)
def test_masks_and_history(name: str, optimizer: str, made: list[dpai_device.DeviceSteps]) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]()
    found = run(net, x, "cuda_source", optimizer=optimizer)
    assert len(made) == 1
    wanted = run(net, x, optimizer=optimizer)
    assert found.kept_by_layer == wanted.kept_by_layer
    assert differing(found, wanted) <= 1e-3
    for a, b in zip(found.metadata["history"], wanted.metadata["history"], strict=True):
        assert a.pop("log_paths") == pytest.approx(b.pop("log_paths"), abs=1e-4)
        assert a == b  # the step, and nodes, kernels and weights on paths


@pytest.mark.filterwarnings("ignore:dpai. stopped")
def test_patience_stops_at_the_same_step(made: list[dpai_device.DeviceSteps]) -> None:
    torch.manual_seed(1)
    net, x = NETS["mlp"]()
    options: dict[str, Any] = {"steps": 60, "patience": 3, "lr": 1e-4}
    found = run(net, x, "cuda_source", **options)
    wanted = run(net, x, **options)
    assert len(made) == 1
    steps = [masks.metadata["history"][-1]["step"] for masks in (found, wanted)]
    assert steps[0] == steps[1] < 60
    assert differing(found, wanted) == 0


def test_more_steps_than_rules_at_once(
    made: list[dpai_device.DeviceSteps], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    net, x = NETS["mlp"]()
    whole = run(net, x, "cuda_source", steps=23, optimizer="adam")
    monkeypatch.setattr(dpai_device, "_AT_ONCE", 5)
    parts = run(net, x, "cuda_source", steps=23, optimizer="adam")
    assert differing(parts, whole) == 0
    assert parts.metadata["history"] == whole.metadata["history"]


def test_dead_networks_name_the_layer(made: list[dpai_device.DeviceSteps]) -> None:
    net = pk.zoo.create("mlp", sizes=(6, 40, 40, 3))
    options: dict[str, Any] = {"sparsity": 0.998, "seed": 3}
    with pytest.raises(PaikernError, match="dead network at step") as found:
        run(net, torch.ones(1, 6), "cuda_source", **options)
    assert len(made) == 1
    with pytest.raises(PaikernError) as wanted:
        run(net, torch.ones(1, 6), **options)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("lr", [3e38, 1e37])
def test_scores_that_are_not_finite(made: list[dpai_device.DeviceSteps], lr: float) -> None:
    torch.manual_seed(4)
    net, x = NETS["mlp"]()
    with pytest.raises(PaikernError, match="NaN or infinite") as found:
        run(net, x, "cuda_source", lr=lr)
    assert len(made) == 1
    with pytest.raises(PaikernError) as wanted:
        run(net, x, lr=lr)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupted_run_goes_on(
    call: int, tmp_path: Path, made: list[dpai_device.DeviceSteps], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    net, x = NETS["branches"]()
    straight = run(net, x, "cuda_source", steps=9)
    calls = 0
    play = Replay.__call__

    def interrupted(self: Replay) -> None:
        nonlocal calls
        calls += 1
        play(self)
        if calls == call:
            raise KeyboardInterrupt

    file = tmp_path / "run.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(Replay, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(net, x, "cuda_source", steps=9, state=file)
    after = run(net, x, "cuda_source", steps=9, state=file)
    assert len(made) == 3
    assert differing(after, straight) == 0
    assert after.metadata["history"] == straight.metadata["history"]


def test_weights_used_twice_run_by_operations(made: list[dpai_device.DeviceSteps]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.a(x)))))

    torch.manual_seed(6)
    net = Twice()
    found = run(net, torch.ones(1, 8), "cuda_source", sparsity=0.5)
    assert not made
    assert differing(found, run(net, torch.ones(1, 8), sparsity=0.5)) == 0
