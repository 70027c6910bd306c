"""Ticks and tocks: scores and counts of every tick, what is stored, and what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern.errors import PaikernWarning
from python_tests.channel_nets import build
from python_tests.oracles import channels as oracle
from python_tests.training import nets

WHOLE = "ignore:.*keep all of their channels:paikern.PaikernWarning"
RESCUED = "ignore:.*would have lost all:paikern.PaikernWarning"

# Of the network "residual" with two branches: the layers of each group, the norms that read it,
# and the weights whose inputs it is.
GROUPS = {
    "stem.0": (["stem.0", "first.1", "second.1"], ["stem.1", "second.2"]),
    "first.0.0": (["first.0.0"], ["first.0.1"]),
    "second.0.0": (["second.0.0"], ["second.0.1"]),
}
READERS = {
    "stem.0": ["first.0.0", "second.0.0", "head.2"],
    "first.0.0": ["first.1"],
    "second.0.0": ["second.1"],
}


def started(model: nn.Module, data: Any, **options: Any) -> Any:
    given = {"sparsity": 0.5, "epochs": 6, "ticks": 2, "penalty": 0.0, **options}
    return pk.pruner("gate_decorators", model, data=data, **given)


def samples(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(4, 3, 8, 8, generator=generator).double(),
            torch.randint(0, 4, (4,), generator=generator),
        )
        for _ in range(count // 4)
    ]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> None:
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def tick(
    net: nn.Module, kept: dict[str, list[bool]], data: Any, keep: int
) -> dict[str, list[bool]]:
    """One tick: scores of the network without what is gone, then the best of what is left."""
    work = copy.deepcopy(net)
    with torch.no_grad():
        for group, (layers, _) in GROUPS.items():
            gone = ~torch.tensor(kept[group])
            for layer in layers:
                work.get_submodule(layer).weight[gone] = 0.0
            for reader in READERS[group]:
                work.get_submodule(reader).weight[:, gone] = 0.0
    gates = oracle.gate_decorators(work, data)
    alive = {group: [c for c, k in enumerate(mask) if k] for group, mask in kept.items()}
    scores = {g: sum(gates[norm] for norm in norms)[alive[g]] for g, (_, norms) in GROUPS.items()}
    best = oracle.select(scores, {g: len(layers) for g, (layers, _) in GROUPS.items()}, keep)
    chosen = {g: {c for c, k in zip(alive[g], best[g], strict=True) if k} for g in GROUPS}
    return {g: [c in chosen[g] for c in range(len(mask))] for g, mask in kept.items()}


@pytest.mark.parametrize("fraction", [None, 0.12])
@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_every_tick_is_that_of_gates_in_the_network(fraction: float | None) -> None:
    """35 outputs; a tick sees what the training and the ticks before it have left."""
    net, data = build("residual")[0].double(), samples()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    pruner = started(
        net, data, optimizer=optimizer, fraction=fraction, last_update=6, sparsity=0.6, ticks=2
    )
    kept = {"stem.0": [True] * 8, "first.0.0": [True] * 6, "second.0.0": [True] * 5}
    rate = 1 - 0.4 ** (1 / 12) if fraction is None else fraction
    done = 0
    for _ in range(6):
        train(net, optimizer, data)
        before = copy.deepcopy(net)
        pruner.on_epoch_end(net)
        for _ in range(2):
            done += 1
            gone = min(0.6, 1 - (1 - rate) ** done)
            keep = 35 - math.floor(35 * gone + 1e-9)
            if keep < sum(sum(kept[g]) * len(GROUPS[g][0]) for g in kept):
                kept = tick(before, kept, data, keep)
        for group, (layers, _) in GROUPS.items():
            for layer in layers:
                assert pruner.masks.channels[f"{layer}.weight"].tolist() == kept[group], layer
    assert sum(sum(kept[g]) * len(GROUPS[g][0]) for g in kept) == 14  # 35 - floor(0.6 * 35)
    pruner.masks.verify(net)


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_gates_are_trained_in_ticks() -> None:
    """Three batches of plain SGD on the gates alone, then their values are gamma and beta."""
    net, data = build("residual")[0].double(), samples()
    net.second[0][1].weight.requires_grad_(False)
    gates, expected = copy.deepcopy(net), {}
    before = nets.copy_of(net)
    paths = [path for path, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for path in paths:
        parent, _, key = path.rpartition(".")
        setattr(gates.get_submodule(parent), key, oracle.GatedNorm(gates.get_submodule(path)))
    gates.train()
    for x, y in data:
        gates.zero_grad()
        nn.functional.cross_entropy(gates(x), y).backward()
        for path in paths:
            gate = gates.get_submodule(path).gate
            step = (gate.detach() * gate.grad).abs()
            expected[path] = expected.get(path, 0) + step
            if path != "second.0.1":  # frozen
                gate.data -= 0.05 * gate.grad
    pruner = started(net, data, gate_lr=0.05, sparsity=0.05, epochs=1, ticks=1)
    event = pruner.on_epoch_end(net)
    assert event.values["ticks"] == 1
    for path in paths:
        trained, norm = gates.get_submodule(path), net.get_submodule(path)
        torch.testing.assert_close(norm.weight.detach(), trained.gate.detach())
        if path != "second.0.1":
            torch.testing.assert_close(norm.bias.detach(), (trained.gate * trained.shift).detach())
            assert not torch.equal(norm.weight, before[f"{path}.weight"])
    scores = {g: sum(expected[norm] for norm in norms) for g, (_, norms) in GROUPS.items()}
    kept = oracle.select(scores, {g: len(layers) for g, (layers, _) in GROUPS.items()}, 34)
    for group in GROUPS:
        assert pruner.masks.channels[f"{group}.weight"].tolist() == kept[group], group
    for name, value in net.state_dict().items():  # convolutions, the classifier, statistics
        if name.rpartition(".")[0] not in paths or "running" in name:
            mask = pruner.masks.get(name, 1)
            assert torch.equal(value, before[name] * mask), name


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_gates_that_blow_up_are_refused() -> None:
    net, data = build("residual")[0].double(), samples()
    before = nets.copy_of(net)
    pruner = started(net, data, gate_lr=1e308)
    with pytest.raises((ValueError, pk.NonFiniteScoreError), match=r"nan|inf|NaN"):
        pruner.on_epoch_end(net)
    assert nets.equal_states(nets.copy_of(net), before)
    assert pruner.masks.sparsity == 0


@pytest.mark.parametrize("fraction", [None, 0.05, 0.2])
@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_exactly_as_many_are_kept_after_every_tick(fraction: float | None) -> None:
    net = pk.zoo.create("resnet20", image_size=8, seed=0)
    data = (torch.randn(16, 3, 8, 8), torch.arange(16) % 10)
    pruner = started(net, data, epochs=8, ticks=3, tock=2, fraction=fraction, last_update=6)
    pruned = [pruner.on_epoch_end(net).pruned for _ in range(8)]
    history = pruner.masks.metadata["history"]
    rate = 1 - 0.5 ** (1 / 9) if fraction is None else fraction
    wanted = [min(0.5, 1 - (1 - rate) ** t) for t in range(1, 10)]
    wanted = wanted[: wanted.index(0.5) + 1] if 0.5 in wanted else wanted
    assert [row["tick"] for row in history] == list(range(1, len(wanted) + 1))
    found = [round(row["density"] * 784) for row in history]
    assert found == [784 - math.floor(784 * gone + 1e-9) for gone in wanted]
    assert pruned == [e % 2 == 0 and e <= (4 if fraction == 0.2 else 6) for e in range(1, 9)]
    kept = sum(int(mask.sum()) for mask in pruner.masks.channels.values())
    assert kept == found[-1]


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_a_target_of_weights_is_met_to_one_channel() -> None:
    net = pk.zoo.create("resnet20", image_size=8, seed=0)
    data = (torch.randn(16, 3, 8, 8), torch.arange(16) % 10)
    pruner = started(net, data, epochs=2, ticks=3, target="weights")
    pruner.on_epoch_end(net)
    most = max(dict(net.named_parameters())[name].numel() for name in pruner.masks)
    wanted = pruner.total - pruner.total // 2
    assert wanted - 8 * most < pruner.masks.kept <= wanted  # a channel of the last stage has seven


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_ticks_that_end_short_say_so() -> None:
    net, data = build("residual")[0].double(), samples()
    pruner = started(net, data, fraction=0.01, epochs=4)
    reasons = [pruner.on_epoch_end(net).reason for _ in range(3)]
    assert "end short of sparsity=0.5" not in reasons[0]
    assert "4 in all; they end short of sparsity=0.5" in reasons[1]
    assert reasons[2] == "masks are final, after 4 ticks"


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_the_best_of_each_group_are_protected() -> None:
    net, data = build("residual")[0].double(), samples()
    pruner = started(net, data, sparsity=0.9, minimal_ratio=0.5, epochs=1, ticks=4)
    with pytest.warns(PaikernWarning, match="keeps in any case"):
        pruner.on_epoch_end(net)
    kept = {name: int(mask.sum()) for name, mask in pruner.masks.channels.items()}
    assert kept["stem.0.weight"] == 4
    assert kept["first.0.0.weight"] == 3
    assert kept["second.0.0.weight"] == 3  # ceil(5 / 2)


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_a_tick_changes_nothing_but_pruned_weights() -> None:
    net, data = build("residual")[0].double(), samples()
    net.train()
    net.stem[0].weight.grad = torch.ones_like(net.stem[0].weight)
    before, random = nets.copy_of(net), torch.get_rng_state()
    pruner = started(net, data, epochs=1)
    pruner.on_epoch_end(net)
    assert pruner.masks.sparsity > 0
    for name, value in net.state_dict().items():
        kept = pruner.masks[name] if name in pruner.masks else torch.ones_like(value).bool()
        assert torch.equal(value, before[name] * kept), name
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(net.stem[0].weight.grad, torch.ones_like(net.stem[0].weight))


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_going_on_from_a_file(cut: int, tmp_path: Path) -> None:
    data = samples()

    def fresh() -> tuple[nn.Module, Any, Any]:
        net = build("residual")[0].double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        options = {"penalty": 1e-2, "gate_lr": 1e-2, "tock": 2, "epochs": 8, "sparsity": 0.6}
        return net, optimizer, started(net, data, optimizer=optimizer, **options)

    def epochs(run: tuple[nn.Module, Any, Any], count: int) -> list[str]:
        net, optimizer, pruner = run
        reasons = []
        for _ in range(count):
            train(net, optimizer, data)
            reasons.append(pruner.on_epoch_end(net).reason)
        return reasons

    whole = fresh()
    expected = epochs(whole, 6)
    first = fresh()
    reasons = epochs(first, cut)
    first[2].save(tmp_path / "pruner.safetensors")
    second = fresh()
    second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    second[2].load(tmp_path / "pruner.safetensors")
    assert reasons + epochs(second, 6 - cut) == expected
    assert second[2].masks == whole[2].masks
    assert second[2].masks.metadata["history"] == whole[2].masks.metadata["history"]
    assert nets.equal_states(second[0].state_dict(), whole[0].state_dict())
    with pytest.raises(ValueError, match="made with ticks=2, but this pruner has ticks=3"):
        started(fresh()[0], data, ticks=3).load_state_dict(
            started(fresh()[0], data, ticks=2).state_dict()
        )


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_the_penalty_ends_with_the_last_tick() -> None:
    net, data = build("residual")[0].double(), samples()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = started(net, data, optimizer=optimizer, penalty=1e-2, epochs=2)
    early = pruner.state_dict()

    def shift() -> Tensor:
        scale = net.stem[1].weight
        before = scale.detach().clone()
        scale.grad = torch.zeros_like(scale)
        optimizer.step()
        return (before - scale.detach()) / before.sign()

    assert torch.allclose(shift(), torch.tensor(1e-3).double())
    pruner.on_epoch_end(net)
    assert not shift().any()
    pruner.load_state_dict(early)
    assert torch.allclose(shift(), torch.tensor(1e-3).double())
    pruner.remove()
    assert not shift().any()


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_channels_can_be_removed_in_the_end() -> None:
    pytest.importorskip("torch_pruning")
    net, data = build("residual")[0].double(), samples()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    pruner = started(net, data, optimizer=optimizer, penalty=1e-4, epochs=4)
    for _ in range(4):
        train(net, optimizer, data)
        pruner.on_epoch_end(net)
    x = data[0][0]
    small = pk.shrink(net.eval(), pruner.masks, example_inputs=x)
    torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)
    weights = dict(small.named_parameters())
    assert sum(weights[name].numel() for name in pruner.masks) == pruner.masks.kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ticks": 0}, "ticks must be >= 1, got 0"),
        ({"tock": 0}, "tock must be >= 1, got 0"),
        ({"fraction": 1.0}, r"fraction must be in \(0, 1\), got 1.0"),
        ({"last_update": 7}, r"last_update must be in \[1, 6\], got 7"),
        ({"tock": 4, "last_update": 3}, "use a shorter tock"),
        ({"minimal_ratio": 1.5}, r"minimal_ratio must be in \[0, 1\], got 1.5"),
        ({"eta": -1.0}, "eta must be >= 0 and finite, got -1.0"),
        ({"eta": float("inf")}, "eta must be >= 0 and finite, got inf"),
        ({"penalty": -1.0}, "penalty must be >= 0, got -1.0"),
        ({"penalty": 1e-5}, "pass optimizer=, or penalty=0"),
        ({"gate_lr": -1.0}, "gate_lr must be >= 0 and finite, got -1.0"),
        ({"target": "filters"}, "target must be one of"),
        ({"mode": "test"}, "mode must be"),
        ({"data": None}, "reads samples when it prunes; pass data="),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    net = build("residual")[0]
    with pytest.raises(ValueError, match=message):
        started(net, **{"data": samples(), **options})


def test_models_without_batch_norm_are_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no batch norm with weights"):
        started(nets.make("mlp"), nets.samples("mlp"))


@pytest.mark.filterwarnings(WHOLE, RESCUED)
def test_after_an_error_everything_is_as_it_was() -> None:
    net, data = build("residual")[0].double(), samples()
    calls = []

    def late(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(1)  # the second tick of the second epoch fails
        return nn.functional.cross_entropy(outputs, targets) * (math.nan if len(calls) == 11 else 1)

    pruner = started(net, data, loss_fn=late)
    pruner.on_epoch_end(net)
    before, masks = nets.copy_of(net), pruner.masks
    with pytest.raises(ValueError, match="the loss of batch 1 is nan"):
        pruner.on_epoch_end(net)
    assert nets.equal_states(nets.copy_of(net), before)
    assert pruner.masks is masks
    assert pruner.epoch == 1
    assert pruner.on_epoch_end(net).values["ticks"] == 4  # and it can be called again
    with torch.no_grad():
        net.stem[0].weight[pruner.masks["stem.0.weight"]] = math.nan
    with pytest.raises(pk.NonFiniteScoreError, match=r"epoch 3: stem\.0\.weight holds"):
        pruner.on_epoch_end(net)
