"""Optimizers and schedules go back to their first settings, also across a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from paikern.training.restart import Restart
from python_tests.training import nets

SCHEDULES: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "milestones": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda e: 1 / (1 + e)),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
}


def parts(name: str) -> tuple[Any, Any, Any]:
    model = nets.make("mlp")
    optimizer = torch.optim.AdamW(
        [{"params": model[1].parameters(), "lr": 0.01}, {"params": model[3].parameters()}],
        lr=0.05,
        betas=(0.8, 0.9),
    )
    return model, optimizer, SCHEDULES[name](optimizer)


def rates(name: str, model: Any, optimizer: Any, scheduler: Any, count: int) -> list[Any]:
    found = []
    for _ in range(count):
        nets.train_epoch(model, optimizer, "mlp")
        scheduler.step(*([1.0] if name == "plateau" else []))
        found.append([(g["lr"], g["betas"]) for g in optimizer.param_groups])
    return found


@pytest.mark.parametrize("through_checkpoint", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_rates_again(name: str, through_checkpoint: bool) -> None:
    model, optimizer, scheduler = parts(name)
    restart = Restart([optimizer], [scheduler])
    first = rates(name, model, optimizer, scheduler, 5)
    if through_checkpoint:
        saved = optimizer.state_dict(), scheduler.state_dict(), json.dumps(restart.progress())
        model, optimizer, scheduler = parts(name)
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        restart = Restart([optimizer], [scheduler])  # made too late: its numbers are not the first
        restart.restore(json.loads(saved[2]))
    restart.now()
    assert not optimizer.state
    assert rates(name, model, optimizer, scheduler, 5) == first
    assert len({str(r) for r in first}) > 1


def test_other_optimizers_are_refused() -> None:
    _, optimizer, scheduler = parts("step")
    stored = Restart([optimizer], [scheduler]).progress()
    with pytest.raises(ValueError, match=r"optimizers of \[2\] groups and 1 schedules"):
        Restart([optimizer], []).restore(stored)
