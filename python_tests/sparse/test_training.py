"""Training in packed form equals dense training with masks attached, up to rounding."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional

import paikern as pk
from python_tests.sparse import nets
from python_tests.sparse.nets import Optimizers, assert_close, assert_equal, dense_state, train

OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov-foreach": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, foreach=True
    ),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-2),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
}
KINDS = ("mlp", "mixer")


def pair(
    kind: str, make: Optimizers, density: float = 0.2
) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, torch.optim.Optimizer, pk.MaskSet]:
    """A packed model and its dense twin with masks attached, each with an optimizer."""
    dense = nets.net(kind)
    masks = nets.random_masks(dense, density)
    packed = pk.sparsify(copy.deepcopy(dense), masks, force=True)
    dense_optimizer = make(dense.parameters())
    masks.attach(dense, dense_optimizer)
    return packed, make(packed.parameters()), dense, dense_optimizer, masks


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_masked_dense_training(kind: str, name: str) -> None:
    packed, optimizer, dense, dense_optimizer, masks = pair(kind, OPTIMIZERS[name])
    before = dense_state(packed)
    losses = train(packed, optimizer, 50)
    dense_losses = train(dense, dense_optimizer, 50)
    assert losses == pytest.approx(dense_losses, rel=1e-3, abs=1e-4)
    assert_close(dense_state(packed), dense.state_dict(), 1e-3)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert any(not torch.equal(before[k], v) for k, v in dense_state(packed).items())
    masks.verify(packed)
    for parameter, state in optimizer.state.items():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.shape in ((), parameter.shape)


def test_schedulers_clipping_and_groups() -> None:
    def run(model: nn.Module, masks: pk.MaskSet | None) -> dict[str, torch.Tensor]:
        last = {id(p) for p in model.get_submodule("last").parameters()}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in last], "lr": 0.2},
            {"params": list(model.get_submodule("last").parameters()), "weight_decay": 0.1},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        if masks is not None:
            masks.attach(model, optimizer)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.2, 0.05], total_steps=20)
        norms = []
        for x, y in nets.batches(20):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            if masks is not None:  # the packed model has no gradient where nothing is kept
                for name, mask in masks.items():
                    grad = model.get_parameter(name).grad
                    assert grad is not None
                    grad.mul_(mask)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.2))
            optimizer.step()
            scheduler.step()
        assert sum(norm > 0.2 for norm in norms) > 10  # what is clipped
        return dense_state(model)

    dense = nets.net("mlp")
    masks = nets.random_masks(dense)
    packed = pk.sparsify(copy.deepcopy(dense), masks, force=True)
    assert_close(run(packed, None), run(dense, masks), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_grad_scaler(kind: str) -> None:
    packed, optimizer, dense, dense_optimizer, masks = pair(kind, OPTIMIZERS["adamw-foreach"])

    def run(model: nn.Module, stepper: torch.optim.Optimizer) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for x, y in nets.batches(10):
            stepper.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
                assert out.dtype == torch.bfloat16
                loss = functional.cross_entropy(out.float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(stepper)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(stepper)
            scaler.update()

    run(packed, optimizer)
    run(dense, dense_optimizer)
    assert all(p.dtype == torch.float32 for p in packed.parameters())
    assert_close(dense_state(packed), dense.state_dict(), 0.05)  # bf16: 8 bits
    masks.verify(packed)


def test_a_skipped_step_changes_nothing() -> None:
    packed, optimizer, *_ = pair("mlp", OPTIMIZERS["adam"])
    before = dense_state(packed)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, _ = next(nets.batches(1))
    scaler.scale(packed(x).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_equal(dense_state(packed), before)
    assert scaler.get_scale() == 2.0**7


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_equal_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    make = OPTIMIZERS["adamw-amsgrad"]
    packed, optimizer, _, _, masks = pair(kind, make)
    train(packed, optimizer, 5)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": packed.state_dict(), "optimizer": optimizer.state_dict()}, path)
    train(packed, optimizer, 5, seed=2)

    again = pk.sparsify(nets.net(kind, seed=9), masks, force=True)
    resumed = make(again.parameters())
    saved = torch.load(path, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, seed=2)
    assert_equal(again.state_dict(), packed.state_dict())


def test_resume_with_an_optimizer_that_was_converted(tmp_path: Path) -> None:
    """The order of the parameters is the same, whichever way the optimizer came about."""
    make = OPTIMIZERS["adam"]
    model = nets.net("mlp")
    optimizer = make(model.parameters())
    masks = nets.random_masks(model)
    pk.sparsify(model, masks, force=True, optimizer=optimizer)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    again = copy.deepcopy(model)
    resumed = make(again.parameters())
    resumed.load_state_dict(state)
    train(again, resumed, 3, seed=2)
    train(model, optimizer, 3, seed=2)
    assert_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_copies_train_alone(kind: str) -> None:
    packed, optimizer, *_ = pair(kind, OPTIMIZERS["adam"])
    train(packed, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    buffer.seek(0)
    twins = [
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
        torch.load(buffer, weights_only=False),
    ]
    average = torch.optim.swa_utils.AveragedModel(
        packed, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    before = dense_state(packed)
    x, _ = next(nets.batches(1))
    expected = packed(x)
    average.update_parameters(packed)  # the first one copies
    train(packed, optimizer, 1)
    average.update_parameters(packed)
    for twin in twins:
        assert_equal(dense_state(twin), before)
        assert torch.equal(twin(x), expected)
        train(twin, OPTIMIZERS["sgd"](twin.parameters()), 1)
    after = dense_state(packed)
    mean = {name: (before[name] + value) / 2 for name, value in after.items()}
    found = {k.removeprefix("module."): v for k, v in dense_state(average).items()}
    del found["n_averaged"]
    assert_close(found, mean, 1e-6)


@pytest.mark.parametrize("density", [0.1, 0.05])
def test_memory_of_training(density: float) -> None:
    """Weights, gradients, Adam's state and positions against dense: at most 0.35 at 90 %."""

    def measured(model: nn.Module) -> int:
        optimizer = torch.optim.Adam(model.parameters())
        x = torch.randn(8, 512, requires_grad=True)
        model(x).square().sum().backward()
        optimizer.step()
        return nets.held_bytes(model, optimizer)

    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 256))
    masks = nets.random_masks(dense, density)
    packed = pk.sparsify(copy.deepcopy(dense), masks, force=True)
    ratio = measured(packed) / measured(dense)
    assert ratio <= 3.5 * density
    assert ratio >= 1.0 * density  # values alone are that much


def test_compiled_without_graph_breaks() -> None:
    for kind in KINDS:
        packed, optimizer, *_ = pair(kind, OPTIMIZERS["adamw-foreach"])
        twin = copy.deepcopy(packed)
        torch._dynamo.reset()
        compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
        frames = torch._dynamo.testing.CompileCounter()
        counted = torch.compile(copy.deepcopy(packed), backend=frames, fullgraph=True)
        losses = train(packed, optimizer, 4)
        found = train(compiled, OPTIMIZERS["adamw-foreach"](twin.parameters()), 4)
        assert found == pytest.approx(losses, rel=1e-5)
        x, _ = next(nets.batches(1))
        packed.eval(), twin.eval()
        with torch.no_grad():
            assert torch.allclose(compiled(x), packed(x), atol=1e-5)
        for _ in range(3):
            counted(x)
        assert frames.frame_count == 1


@pytest.mark.slow
def test_compiled_with_inductor() -> None:
    packed, optimizer, *_ = pair("mlp", OPTIMIZERS["adamw-foreach"])
    twin = copy.deepcopy(packed)
    compiled = torch.compile(twin, fullgraph=True)
    losses = train(packed, optimizer, 4)
    found = train(compiled, OPTIMIZERS["adamw-foreach"](twin.parameters()), 4)
    assert found == pytest.approx(losses, rel=1e-4)
