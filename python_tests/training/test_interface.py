"""The interface that all methods share: choosing, masks, errors, states that go on."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from python_tests.training import nets

RUNS: dict[str, dict[str, Any]] = {
    "asni": {"sparsity": 0.8, "epochs": 6},
    "imp": {"sparsity": 0.45, "epochs": 2},
    "ltr": {"sparsity": 0.45, "epochs": 2, "rewind": 4},
    "earlycrop_u": {"sparsity": 0.6, "epochs": 6, "latest": 4},
    "one_shot": {"sparsity": 0.6, "epochs": 6, "at": 2, "method": "snip"},
}
TOTAL_EPOCHS = 6


def start(method: str, name: str) -> tuple[nn.Module, torch.optim.Optimizer, Any, Any]:
    model = nets.make(name)
    opt = nets.adam(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, TOTAL_EPOCHS)
    options = dict(RUNS[method])
    data = nets.samples(name)
    pruner = pk.pruner(
        method, model, optimizer=opt, scheduler=scheduler, data=data, seed=3, **options
    )
    return model, opt, scheduler, pruner


def epochs(
    count: int, name: str, model: nn.Module, opt: Any, scheduler: Any, pruner: Any
) -> list[pk.training.Event]:
    events = []
    for epoch in range(count):
        torch.manual_seed(100 + pruner.epoch)  # dropout
        nets.train_epoch(model, opt, name)
        scheduler.step()
        events.append(pruner.on_epoch_end(model))
        assert events[-1].epoch == pruner.epoch, epoch
    return events


def through_memory(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.filterwarnings("ignore:layer collapse")  # snip empties queries and keys
@pytest.mark.parametrize("cut", [1, 3, 5])
@pytest.mark.parametrize("name", ["residual", "bert"])
@pytest.mark.parametrize("method", RUNS)
def test_going_on_from_a_checkpoint_changes_nothing(method: str, name: str, cut: int) -> None:
    whole = start(method, name)
    events = epochs(TOTAL_EPOCHS, name, *whole)

    model, opt, scheduler, pruner = start(method, name)
    first = epochs(cut, name, model, opt, scheduler, pruner)
    saved = through_memory(
        {
            "model": model.state_dict(),
            "opt": opt.state_dict(),
            "scheduler": scheduler.state_dict(),
            "pruner": pruner.state_dict(),
        }
    )
    model, opt, scheduler, pruner = start(method, name)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    scheduler.load_state_dict(saved["scheduler"])
    pruner.load_state_dict(saved["pruner"])
    assert pruner.epoch == cut
    rest = epochs(TOTAL_EPOCHS - cut, name, model, opt, scheduler, pruner)

    assert [e.reason for e in first + rest] == [e.reason for e in events]
    assert [e.kept for e in first + rest] == [e.kept for e in events]
    assert pruner.masks == whole[3].masks
    assert nets.equal_states(nets.copy_of(model), nets.copy_of(whole[0]))
    assert any(event.pruned for event in events)


@pytest.mark.parametrize("method", RUNS)
def test_states_go_through_files(method: str, tmp_path: Any) -> None:
    parts = start(method, "mlp")
    epochs(4, "mlp", *parts)
    pruner = parts[3]
    pruner.save(tmp_path / "pruner.safetensors")
    model, _, _, fresh = start(method, "mlp")
    fresh.load(tmp_path / "pruner.safetensors")
    assert fresh.masks == pruner.masks
    assert fresh.masks.metadata == pruner.masks.metadata
    fresh.masks.verify(model)
    again, state = fresh.state_dict(), pruner.state_dict()
    assert again.keys() == state.keys()
    tensors, others = state.pop("tensors"), again.pop("tensors")
    assert state == again
    assert nets.equal_states(tensors, others)


@pytest.mark.parametrize("method", RUNS)
def test_same_seed_same_masks(method: str) -> None:
    digests = set()
    for _ in range(2):
        parts = start(method, "mlp")
        epochs(5, "mlp", *parts)
        digests.add(parts[3].masks.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile])
def test_wrapped_models_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nets.make("mlp")
    pruner = pk.pruner("asni", model, sparsity=0.5, epochs=2)
    wrapped = wrap(model)
    pruner.on_epoch_end(wrapped)
    event = pruner.on_epoch_end(wrapped)
    assert event.kept == pruner.total - int(0.5 * pruner.total)
    assert event.sparsity == pytest.approx(0.5, abs=1e-3)
    pruner.masks.verify(model)


def test_masks_before_the_first_pruning_keep_everything() -> None:
    model = nets.make("mlp")
    before = nets.copy_of(model)
    pruner = pk.pruner("imp", model, sparsity=0.5, epochs=2)
    assert pruner.masks.sparsity == 0
    pruner.on_epoch_end(model)
    assert nets.equal_states(before, nets.copy_of(model))


def test_without_an_optimizer_masks_hold_at_epoch_ends() -> None:
    model = nets.make("mlp")
    opt = nets.sgd(model)
    pruner = pk.pruner("asni", model, sparsity=0.5, epochs=3)
    for _ in range(3):
        nets.train_epoch(model, opt, "mlp")
        pruner.on_epoch_end(model)
        pruner.masks.verify(model)
    nets.train_epoch(model, opt, "mlp")
    assert pruner.masks.problems(model)  # nobody has applied them since


def test_remove_lets_go() -> None:
    model = nets.make("mlp")
    opt = nets.sgd(model)
    pruner = pk.pruner("asni", model, sparsity=0.5, epochs=1, optimizer=opt)
    pruner.on_epoch_end(model)
    nets.train_epoch(model, opt, "mlp")
    pruner.masks.verify(model)
    pruner.remove()
    nets.train_epoch(model, opt, "mlp")
    assert pruner.masks.problems(model)


def test_ignored_layers_stay_dense() -> None:
    model = nets.make("residual")
    pruner = pk.pruner("asni", model, sparsity=0.5, epochs=1, ignore=["head"])
    pruner.on_epoch_end()
    assert "head.weight" not in pruner.masks
    assert bool((model.head.weight != 0).all())


def test_two_optimizers() -> None:
    model = nets.make("mlp")
    opts = [nets.sgd(model[1]), nets.adam(model[3])]
    pruner = pk.pruner("asni", model, sparsity=0.5, epochs=1, optimizer=opts)
    pruner.on_epoch_end()
    x, y = nets.samples("mlp")
    nn.functional.cross_entropy(model(x), y).backward()
    for opt in opts:
        opt.step()
        pruner.masks.verify(model)


def test_optimizers_are_looked_at_before_training() -> None:
    model = nets.make("residual")
    norms = torch.optim.SGD([*model.norm1.parameters(), *model.norm2.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="holds none of the masked parameters"):
        pk.pruner("asni", model, sparsity=0.5, epochs=1, optimizer=norms)
    with pytest.raises(ValueError, match="LBFGS"):
        pk.pruner(
            "asni", model, sparsity=0.5, epochs=1, optimizer=torch.optim.LBFGS(model.parameters())
        )
    others = [model.stem.weight, model.conv.weight, *model.head.parameters()]
    weights = torch.optim.SGD(others, lr=0.1)
    pruner = pk.pruner("imp", model, sparsity=0.5, epochs=1, optimizer=[norms, weights])
    for optimizer in (norms, weights):
        optimizer.param_groups[0]["lr"] = 0.01
    assert pruner.on_epoch_end().rewound
    assert [o.param_groups[0]["lr"] for o in (norms, weights)] == [0.1, 0.1]
    pruner.masks.verify(model)


def test_models_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nets.mlp()
    for name, options in (("asni", {}), ("earlycrop_u", {"method": "magnitude"})):
        with pytest.raises(ValueError, match=r"1\.weight is on the meta device"):
            pk.pruner(name, model, sparsity=0.5, epochs=3, **options)


def collapsing() -> nn.Module:
    """A layer of tiny weights behind one of large ones."""
    model = nets.make("mlp")
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    return model


def test_an_emptied_layer_is_warned_about_once() -> None:
    pruner = pk.pruner("asni", collapsing(), sparsity=0.9, epochs=3, gamma=0.3)
    with pytest.warns(pk.errors.PaikernWarning, match=r"epoch 1: 3\.weight keeps no weight"):
        pruner.on_epoch_end()
    pruner.on_epoch_end()  # any warning would be an error
    assert pruner.masks.kept_by_layer["3.weight"] == 0


def test_collapse_can_be_refused_or_repaired() -> None:
    model = collapsing()
    pruner = pk.pruner("imp", model, sparsity=0.9, epochs=1, on_collapse="raise")
    before = nets.copy_of(model)
    with pytest.raises(pk.SparsityError, match=r"3\.weight would keep no weight"):
        pruner.on_epoch_end()
    assert nets.equal_states(before, nets.copy_of(model))
    pruner = pk.pruner("imp", model, sparsity=0.9, epochs=1, on_collapse="floor")
    while not (event := pruner.on_epoch_end()).stop:
        assert pruner.masks.kept_by_layer["3.weight"] >= 1
    assert event.kept == pruner.total - int(0.9 * pruner.total)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "asnii"}, ValueError, "unknown name 'asnii'; did you mean 'asni'"),
        ({"gama": 3}, ValueError, "has no such option; did you mean 'gamma'"),
        ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
        ({"epochs": 2.5}, ValueError, "epochs must be an integer >= 1, got 2.5"),
        ({"seed": 1.5}, ValueError, "seed must be an integer"),
        ({"on_collapse": "hope"}, ValueError, "on_collapse must be one of"),
        ({"sparsity": 1.0}, pk.SparsityError, r"sparsity must be in \[0, 1\)"),
        ({"density": 0.5}, pk.SparsityError, "exactly one of sparsity, density"),
        ({"optimizer": "sgd"}, TypeError, "must be a torch.optim.Optimizer, got str"),
        ({"scheduler": 3}, TypeError, "torch learning-rate scheduler, got int"),
        ({"ignore": ["head"]}, ValueError, "'head' is no parameter or module"),
    ],
)
def test_arguments_that_do_not_fit(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = nets.make("mlp")
    before = nets.copy_of(model)
    given = {"name": "asni", "sparsity": 0.5, "epochs": 3, **arguments}
    with pytest.raises(error, match=message):
        pk.pruner(given.pop("name"), model, **given)
    assert nets.equal_states(before, nets.copy_of(model))


def test_another_model_is_refused() -> None:
    pruner = pk.pruner("asni", nets.make("mlp"), sparsity=0.5, epochs=3)
    with pytest.raises(pk.MaskFormatError, match="belong to another model"):
        pruner.on_epoch_end(nets.make("residual"))
    assert pruner.epoch == 0


def test_states_of_others_are_refused(tmp_path: Any) -> None:
    pruner = pk.pruner("asni", nets.make("mlp"), sparsity=0.5, epochs=3)
    pruner.on_epoch_end()
    state = pruner.state_dict()
    imp = pk.pruner("imp", nets.make("mlp"), sparsity=0.5, epochs=3)
    with pytest.raises(ValueError, match="of pruner 'asni', but this is 'imp'"):
        imp.load_state_dict(state)
    other = pk.pruner("asni", nets.make("mlp"), sparsity=0.6, epochs=3)
    with pytest.raises(ValueError, match=r"made with sparsity=0\.5, .* has sparsity=0\.6"):
        other.load_state_dict(state)
    model = nets.make("residual")
    before = nets.copy_of(model)
    with pytest.raises(pk.MaskFormatError, match="belongs to another model"):
        pk.pruner("asni", model, sparsity=0.5, epochs=3).load_state_dict(state)
    assert nets.equal_states(before, nets.copy_of(model))
    with pytest.raises(ValueError, match="not a paikern-pruner state"):
        pruner.load_state_dict({"epoch": 3})
    (tmp_path / "junk").write_bytes(b"junk")
    for path in (tmp_path / "junk", tmp_path / "missing"):
        with pytest.raises(pk.MaskFormatError, match="not the state of a pruner"):
            pruner.load(path)


def test_the_table_names_every_method() -> None:
    rows = {row["name"]: row for row in pk.training.pruner_rows()}
    assert set(RUNS) <= set(rows)
    for name in RUNS:
        assert rows[name]["summary"]
        assert rows[name]["source"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("asni", {"gamma": "x"}, "gamma must be a number or None, got 'x'"),
        ("asni", {"last_update": 1.5}, "last_update must be an integer or None, got 1.5"),
        ("asni", {"beta": None}, "beta must be a number, got None"),
        ("imp", {"rewind": 1.5}, "rewind must be an integer, got 1.5"),
        ("imp", {"levels": 2.5}, "levels must be an integer or None, got 2.5"),
        ("imp", {"fraction": True}, "fraction must be a number, got True"),
        ("imp", {"unit": 3}, "unit must be a string, got 3"),
        ("one_shot", {"at": "2"}, "at must be an integer, got '2'"),
        ("one_shot", {"method_options": "x"}, "method_options must be a dict of options, got 'x'"),
        ("earlycrop_u", {"latest": 2.5, "data": 1}, "latest must be an integer or None, got 2.5"),
        ("earlybird_ticket", {"window": 2.5}, "window must be an integer, got 2.5"),
        (None, {}, "give the name of a method, such as 'asni'; got None"),
    ],
)
def test_options_of_another_type(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        pk.pruner(name, nets.make("residual"), sparsity=0.5, epochs=3, **options)


def test_neither_model_nor_state() -> None:
    given: Any = "net"
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        pk.pruner("asni", given, sparsity=0.5, epochs=3)
    pruner = pk.pruner("asni", nets.make("mlp"), sparsity=0.5, epochs=3)
    nothing: Any = None
    with pytest.raises(TypeError, match=r"state must be what .* returned, got NoneType"):
        pruner.load_state_dict(nothing)
