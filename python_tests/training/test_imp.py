"""IMP and LTR: counts of every level, survivors only, what a rewind puts back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from python_tests.oracles import training as oracle
from python_tests.training import nets


def run(
    model: nn.Module, opt: Any, pruner: Any, name: str, scheduler: Any = None
) -> list[pk.training.Event]:
    """Train until the pruner says stop."""
    events = []
    while not events or not events[-1].stop:
        nets.train_epoch(model, opt, name)
        if scheduler is not None:
            scheduler.step()
        events.append(pruner.on_epoch_end(model))
        assert len(events) < 200
    return events


@pytest.mark.parametrize("name", nets.NETS)
def test_levels_remove_a_fifth_of_the_survivors(name: str) -> None:
    model = nets.make(name)
    opt = nets.sgd(model)
    initial = nets.copy_of(model)
    pruner = pk.pruner("imp", model, sparsity=0.7, epochs=2, optimizer=opt)
    counts = oracle.imp_counts(pruner.total, pruner.total - int(0.7 * pruner.total))
    for level, kept in enumerate(counts):
        assert pruner.masks.kept == pruner.kept_at(level) == kept
        survivors = dict(pruner.masks)
        nets.train_epoch(model, opt, name)
        assert not pruner.on_epoch_end(model).pruned
        nets.train_epoch(model, opt, name)
        held = dict(model.named_parameters())
        trained = {n: held[n].detach().clone() for n in pruner.masks}
        event = pruner.on_epoch_end(model)
        if level == len(counts) - 1:
            assert event.stop
            assert not event.pruned
            break
        assert event.rewound
        assert event.pruned
        assert not opt.state
        expected = oracle.largest(trained, counts[level + 1])
        for n, mask in pruner.masks.items():
            assert torch.equal(mask, expected[n])
            assert not (mask & ~survivors[n]).any()
            assert torch.equal(held[n].detach(), torch.where(mask, initial[n], 0))
        for n, value in model.state_dict().items():
            if n not in pruner.masks:
                assert torch.equal(value, initial[n])
    assert pruner.masks.kept == counts[-1]
    pruner.masks.verify(model)
    assert pruner.on_epoch_end(model).stop


def test_levels_of_equal_compression() -> None:
    model = nets.make("mlp")
    pruner = pk.pruner("imp", model, sparsity=0.9, epochs=1, levels=3)
    total = pruner.total
    wanted = [total - math.floor((1 - 0.1 ** (level / 3)) * total) for level in (1, 2)]
    kept = [pruner.on_epoch_end(model).kept for _ in range(4)]
    assert kept == [*wanted, total - int(0.9 * total), total - int(0.9 * total)]


def test_schedules_start_again() -> None:
    model = nets.make("mlp")
    opt = nets.sgd(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    pruner = pk.pruner(
        "imp", model, sparsity=0.3, epochs=2, optimizer=opt, scheduler=scheduler, fraction=0.5
    )
    rates = []
    for _ in range(4):
        rates.append(opt.param_groups[0]["lr"])
        nets.train_epoch(model, opt, "mlp")
        scheduler.step()
        event = pruner.on_epoch_end(model)
    assert rates == pytest.approx([0.1, 0.05, 0.1, 0.05])
    assert event.stop


def test_rewinds_to_a_step_of_the_first_level() -> None:
    model = nets.make("residual")
    opt = nets.adam(model)
    pruner = pk.pruner("ltr", model, sparsity=0.5, epochs=2, optimizer=opt, rewind=4)
    at_step: list[dict[str, torch.Tensor]] = []
    nets.train_epoch(model, opt, "residual", after_step=lambda: at_step.append(nets.copy_of(model)))
    pruner.on_epoch_end(model)
    nets.train_epoch(model, opt, "residual", after_step=lambda: at_step.append(nets.copy_of(model)))
    assert pruner.on_epoch_end(model).rewound
    now = model.state_dict()
    for n, value in at_step[3].items():
        mask = pruner.masks[n] if n in pruner.masks else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(now[n], torch.where(mask, value, 0).to(value.dtype)), n
    run(model, opt, pruner, "residual")
    assert pruner.masks.kept == pruner.total - int(0.5 * pruner.total)


def test_rewinds_to_an_epoch() -> None:
    model = nets.make("mlp")
    opt = nets.sgd(model)
    pruner = pk.pruner("ltr", model, sparsity=0.2, epochs=3, optimizer=opt, rewind=1, unit="epoch")
    nets.train_epoch(model, opt, "mlp")
    after_one = nets.copy_of(model)
    for _ in range(3):
        event = pruner.on_epoch_end(model)
        nets.train_epoch(model, opt, "mlp")
        if event.rewound:
            break
    assert event.rewound
    # trained one epoch since, from the weights of the first epoch
    again = nets.make("mlp")
    again.load_state_dict(after_one)
    masks = pruner.masks
    opt2 = nets.sgd(again)
    with masks.attach(again, opt2):
        nets.train_epoch(again, opt2, "mlp")
    assert nets.equal_states(nets.copy_of(model), nets.copy_of(again))


def test_few_survivors_stop_with_a_reason() -> None:
    layer = nn.Linear(10, 1, bias=False)
    pruner = pk.pruner("imp", layer, sparsity=0.9, epochs=1)
    events = []
    while not events or not events[-1].stop:
        events.append(pruner.on_epoch_end())
    assert [event.kept for event in events] == [8, 7, 6, 5, 4, 4]
    assert "4 survivors are too few" in events[-1].reason


def test_a_rewind_point_that_never_came_is_an_error() -> None:
    model = nets.make("mlp")
    opt = nets.sgd(model)
    pruner = pk.pruner("ltr", model, sparsity=0.5, epochs=1, optimizer=opt)
    nets.train_epoch(model, opt, "mlp")
    before = nets.copy_of(model)
    with pytest.raises(ValueError, match="level 0 has ended before step 1000"):
        pruner.on_epoch_end(model)
    assert nets.equal_states(before, nets.copy_of(model))
    assert pruner.masks.sparsity == 0


def test_nan_after_training_names_the_level() -> None:
    model = nets.make("mlp")
    pruner = pk.pruner("imp", model, sparsity=0.5, epochs=1)
    pruner.on_epoch_end(model)
    digest = pruner.masks.digest
    with torch.no_grad():
        model[1].weight.fill_(math.nan)
    with pytest.raises(pk.NonFiniteScoreError, match=r"level 1: 1\.weight holds 640 NaN"):
        pruner.on_epoch_end(model)
    assert pruner.masks.digest == digest


def test_another_model_at_the_rewind_is_refused() -> None:
    model = nets.make("residual")
    pruner = pk.pruner("imp", model, sparsity=0.5, epochs=1)
    other = nets.make("residual")
    other.norm1 = nn.BatchNorm2d(8, track_running_stats=False)
    before = nets.copy_of(other)
    with pytest.raises(pk.MaskFormatError, match=r"rewind: 'norm1\.\w+' had shape"):
        pruner.on_epoch_end(other)
    assert nets.equal_states(before, nets.copy_of(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, r"fraction must be in \(0, 1\), got 1.0"),
        ({"levels": 0}, "levels must be >= 1 or None, got 0"),
        ({"unit": "hour"}, "unit must be one of"),
        ({"rewind": -1}, "rewind must be >= 0"),
        ({"rewind": 9}, "level 0 has 3 epochs, so rewind=9 never comes"),
        ({"rewind": 9, "unit": "step"}, "pass optimizer=, or use unit='epoch'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.pruner("imp", nets.mlp(), sparsity=0.5, epochs=3, **options)


def test_an_earlier_state_counts_steps_again() -> None:
    model = nets.make("mlp")
    opt = nets.sgd(model)
    pruner = pk.pruner("ltr", model, sparsity=0.5, epochs=1, optimizer=opt, rewind=2)
    early, start = pruner.state_dict(), nets.copy_of(model)
    nets.train_epoch(model, opt, "mlp")
    first = pruner.on_epoch_end(model)
    assert first.rewound
    rewound = nets.copy_of(model)
    pruner.load_state_dict(early)
    model.load_state_dict(start)
    nets.train_epoch(model, opt, "mlp")
    assert pruner.on_epoch_end(model) == first
    assert nets.equal_states(nets.copy_of(model), rewound)
