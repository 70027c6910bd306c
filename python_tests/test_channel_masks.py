"""Masks by channels: counts, floors, rounds, files, and what is refused."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import paikern as pk
from paikern.channels import best_with_sum
from paikern.errors import MaskFormatError, PaikernWarning, SparsityError
from paikern.scorers.crop_s import CroPitS
from python_tests.channel_nets import BUILDERS, COUPLED, build
from python_tests.oracles.channels import nodes_kept

DATA_FREE = ["random_s", "l1_filters"]


def classes(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.arange(len(x)) % net(x).shape[-1]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("method", ["snap", "crop_s"])
@pytest.mark.parametrize("name", ["mlp", "vgg", "residual", "dense", "resnet20"])
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_exactly_k_outputs_are_kept(name: str, method: str, sparsity: float) -> None:
    net, x = build(name)
    masks = pk.prune(net, method, sparsity=sparsity, data=(x, classes(net, x)))
    total = sum(mask.numel() for mask in masks.channels.values())
    kept = sum(int(mask.sum()) for mask in masks.channels.values())
    floor = sum(len(group) for group in COUPLED.get(name, []))  # one channel of each group
    assert kept == max(nodes_kept(total, sparsity), floor)
    assert masks.node_sparsity == pytest.approx(1 - kept / total)
    assert all(bool(mask.any()) for mask in masks.channels.values())
    assert all(masks.kept_by_layer.values())


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.99])
@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("name", [name for name in COUPLED if "grouped" not in name])
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_every_layer_loses_the_same_fraction(name: str, method: str, sparsity: float) -> None:
    net, x = build(name)
    masks = pk.prune(net, method, sparsity=sparsity, example_inputs=x)
    assert set(masks.channels) == {f"{n}.weight" for group in COUPLED[name] for n in group}
    for kept in masks.channels.values():
        assert int(kept.sum()) == max(1, nodes_kept(len(kept), sparsity))


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_a_removed_channel_has_no_row_and_no_column(name: str) -> None:
    net, x = build(name)
    masks = pk.prune(net, "random_s", sparsity=0.5, example_inputs=x)
    for parameter, kept in masks.channels.items():
        weight = dict(net.named_parameters())[parameter].detach()
        layer = net.get_submodule(parameter[:-7])
        if isinstance(layer, nn.ConvTranspose2d):  # [in, out / groups, ...]
            weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        rows = weight.flatten(1)
        assert not rows[~kept].any()
        assert bool(rows[kept].any(1).all())
    masks.verify(net)


def test_what_nobody_reads_does_not_reach_the_output() -> None:
    net, x = build("residual")
    pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    before = net(x)
    with torch.no_grad():
        gone = net.stem[0].weight.flatten(1).abs().sum(1) == 0
        assert int(gone.sum()) == 4
        for layer in (net.stem[0], net.first[1], net.second[1], net.stem[1], net.second[2]):
            layer.bias[gone] += 100.0
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("method", ["l1_filters", "snap"])
@pytest.mark.parametrize("name", ["vgg", "residual", "mobile", "grouped", "resnet20"])
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_a_target_of_weights_is_met_to_one_channel(name: str, method: str, sparsity: float) -> None:
    net, x = build(name)
    given = (x, classes(net, x))
    masks = pk.prune(net, method, sparsity=sparsity, target="weights", data=given, scope="global")
    wanted = nodes_kept(masks.total, sparsity)
    # One channel more would be too many; with its coupled layers it has no more weights than these.
    most = max(dict(net.named_parameters())[name].numel() for name in masks)
    assert wanted - most < masks.kept <= wanted


def test_bisection_of_a_chain_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False))
    # Each of the four channels has 2 + 3 weights; 20 in all.
    for sparsity, channels in ((0.24, 3), (0.29, 3), (0.3, 2), (0.5, 2), (0.7, 1)):
        masks = pk.prune(
            net, "random_s", sparsity=sparsity, target="weights", example_inputs=torch.ones(1, 2),
            apply=False,
        )  # fmt: skip
        assert int(masks.channels["0.weight"].sum()) == channels, sparsity
        assert masks.kept == 5 * channels


@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_cropit_keeps_exactly_k_in_every_round() -> None:
    net, x = build("resnet20")
    masks = pk.prune(net, "cropit_s", sparsity=0.9, data=(x, classes(net, x)))
    found = [round(row["density"] * 784) for row in masks.metadata["history"]]
    removed = [0.5, 0.7, 0.8, 0.85, 0.875, 0.8875, 0.9]
    assert found == [784 - math.floor(p * 784 + 1e-9) for p in removed]


def test_rounds_score_what_is_left() -> None:
    """Two rounds: the second ranks under the masks of the first and brings nothing back."""
    seen = []

    class Spy(pk.scorers.L1Filters):
        name = "spy"

        def channel_scores(self, run, groups):  # type: ignore[no-untyped-def]
            scores = super().channel_scores(run, groups)
            if run.masks:  # in the second round prefer what is gone
                kept = run.cache["seen"]
                scores = {n: torch.where(kept[n], s, 1e6) for n, s in scores.items()}
            else:
                best = {
                    n: s >= s.sort(descending=True).values[len(s) // 2] for n, s in scores.items()
                }
                run.cache["seen"] = best
            seen.append(scores)
            return scores

    net, x = build("mlp")
    masks = pk.prune(net, Spy(), sparsity=0.7, rounds=2, schedule="linear", example_inputs=x)
    assert len(seen) == 2
    first = {n: s.sort(descending=True).values for n, s in seen[0].items()}
    for layer, kept in masks.channels.items():
        group = layer.removesuffix(".weight")
        gone = seen[1][group] == 1e6
        rank = len(first[group]) - math.floor(0.35 * len(first[group]))
        lost = seen[0][group] < first[group][rank - 1]
        assert not bool((kept & lost).any())
        assert bool(gone.any())


def test_floors_are_reported_and_can_be_refused() -> None:
    net, x = build("mlp")
    with torch.no_grad():
        net.layers[1].weight *= 1e-3
    with pytest.warns(PaikernWarning, match=r"layers\.1 would have lost all channels"):
        masks = pk.prune(net, "l1_filters", sparsity=0.7, scope="global", example_inputs=x)
    assert int(masks.channels["layers.1.weight"].sum()) == 1
    with pytest.raises(SparsityError, match=r"layers\.1 would keep no channel"):
        pk.prune(
            net, "l1_filters", sparsity=0.7, scope="global", example_inputs=x, on_collapse="raise"
        )
    with pytest.warns(PaikernWarning, match="keeps in any case: 2 nodes where sparsity=0.99"):
        pk.prune(net, "random_s", sparsity=0.99, example_inputs=x)


@pytest.mark.filterwarnings("ignore:.*would have lost:paikern.PaikernWarning")
def test_the_best_of_each_group_stay_with_gate_decorators() -> None:
    net, x = build("resnet20")
    given = (x, classes(net, x))
    with pytest.warns(PaikernWarning, match="keeps in any case"):
        masks = pk.prune(net, "gate_decorators", sparsity=0.95, minimal_ratio=0.25, data=given)
    assert all(int(kept.sum()) == len(kept) // 4 for kept in masks.channels.values())


@pytest.mark.parametrize("method", DATA_FREE)
def test_same_seed_same_masks(method: str) -> None:
    net, x = build("residual")
    options = {"sparsity": 0.5, "example_inputs": x, "apply": False}
    first, again = (pk.prune(net, method, seed=4, **options) for _ in range(2))
    assert first == again
    assert first.channels.keys() == again.channels.keys()
    other = pk.prune(net, method, seed=5, **options)
    assert (other == first) == (method != "random_s")


@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_ties_go_to_the_lower_channel() -> None:
    net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (net[0], net[2], net[4]):
        nn.init.constant_(layer.weight, 0.5)
    masks = pk.prune(
        net, "l1_filters", sparsity=0.5, scope="global", example_inputs=torch.ones(1, 2)
    )
    # Channels of the second layer score 6 * 0.5, those of the first 2 * 0.5.
    assert masks.channels["2.weight"].tolist() == [True] * 4
    assert masks.channels["0.weight"].tolist() == [True] + [False] * 5


def test_a_file_keeps_the_channels(tmp_path: Path) -> None:
    net, x = build("resnet20")
    masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    masks.save(tmp_path / "masks.safetensors")
    found = pk.load_masks(tmp_path / "masks.safetensors")
    assert found == masks
    assert found.node_sparsity == masks.node_sparsity == pytest.approx(0.5)
    for name, kept in masks.channels.items():
        assert torch.equal(found.channels[name], kept)
    assert found.metadata["kept_whole"] == {"fc.weight": "its outputs are those of the model"}


@pytest.mark.parametrize("stored", ["text", {"a.weight": [8]}, {"a.weight": [9, "ff"]},
                                    {"a.weight": [8, "xy"]}, {"a.weight": [-1, ""]}])  # fmt: skip
def test_damaged_channels_are_a_format_error(stored: object) -> None:
    masks = pk.MaskSet.from_bool({"a.weight": torch.ones(8, 2, dtype=torch.bool)})
    assert masks.channels == {}
    assert masks.node_sparsity == 0.0
    damaged = pk.MaskSet({"a.weight": masks.packed("a.weight")}, masks.shapes, {"channels": stored})
    with pytest.raises(MaskFormatError, match="channels: the"):
        _ = damaged.channels


def test_zero_sparsity_keeps_everything() -> None:
    net, x = build("vgg")
    masks = pk.prune(net, "l1_filters", sparsity=0.0, example_inputs=x)
    assert masks.node_sparsity == 0.0
    assert masks.kept == masks.total


def test_an_amount_counts_what_the_target_counts() -> None:
    net, x = build("mlp")
    masks = pk.prune(net, "l1_filters", amount=5, scope="global", example_inputs=x, apply=False)
    assert sum(int((~kept).sum()) for kept in masks.channels.values()) == 5
    masks = pk.prune(
        net, "l1_filters", amount=30, scope="global", target="weights", example_inputs=x
    )
    assert 30 <= masks.total - masks.kept < 30 + 17  # a channel has up to 9 + 8 weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, "pattern='2:4': l1_filters removes whole channels"),
        ({"scope": "erk"}, "scope='erk': l1_filters removes whole channels"),
        ({"selection": "published"}, "selection='published': l1_filters selects exactly"),
        ({"target": "filters"}, "target must be one of"),
        ({"variant": "published"}, "no 'published' variant"),
        ({"ignore": ["layers.3"]}, "no channel that l1_filters could remove"),
    ],
)
def test_what_is_refused(options: dict[str, object], message: str) -> None:
    net, x = build("mlp")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x, **options)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_networks_without_what_a_method_needs() -> None:
    single = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"no channel .*0\.weight: its outputs are those"):
        pk.prune(single, "random_s", sparsity=0.5, example_inputs=torch.ones(1, 4))
    net, x = build("mlp")
    with pytest.raises(ValueError, match="no batch norm with weights"):
        pk.prune(net, "earlybird", sparsity=0.5, example_inputs=x)
    with pytest.raises(ValueError, match="no batch norm with weights"):
        pk.prune(net, "gate_decorators", sparsity=0.5, data=(x, classes(net, x)))
    with pytest.raises(ValueError, match="reads samples; pass data="):
        pk.prune(net, "snap", sparsity=0.5, example_inputs=x)
    net.layers[1].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers\.1\.weight is frozen"):
        pk.prune(net, "snap", sparsity=0.5, data=(x, classes(net, x)))


def test_layers_that_stay_whole_are_listed() -> None:
    net, x = build("transformer")
    with pytest.warns(PaikernWarning, match="layers keep all of their channels"):
        masks = pk.prune(net, "l1_filters", sparsity=0.5, example_inputs=x)
    assert "attention.in_proj_weight" in masks.metadata["kept_whole"]
    assert bool(masks["attention.in_proj_weight"].all())


class TwosAndThrees(nn.Module):
    """Channels of two outputs, a product, and channels of three, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.c, self.d, self.e = (nn.Linear(6, 5) for _ in range(3))
        self.out = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).tanh() * self.b(x)
        return self.out((self.c(x) + self.d(x) + self.e(x)).tanh())


@pytest.mark.parametrize("kept", range(7, 26))
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_channels_of_several_outputs_make_up_the_number(kept: int) -> None:
    torch.manual_seed(0)
    net, x = TwosAndThrees(), torch.ones(1, 4)
    masks = pk.prune(
        net, "l1_filters", amount=27 - kept, scope="global", example_inputs=x, apply=False
    )
    assert sum(int(mask.sum()) for mask in masks.channels.values()) == kept


@pytest.mark.parametrize("seed", range(40))
def test_the_best_choice_with_a_sum_is_that_of_all_choices(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = (torch.randint(1, 4, (8,), generator=draw) * (1 + seed % 3)).tolist()
    total = int(torch.randint(1, sum(sizes) + 3, (1,), generator=draw))
    choices = [c for n in range(9) for c in itertools.combinations(range(8), n)]
    fits = [c for c in choices if sum(sizes[place] for place in c) <= total]
    first = max(fits, key=lambda c: (sum(sizes[p] for p in c), [place in c for place in range(8)]))
    assert best_with_sum(sizes, total) == list(first)


def test_three_outputs_a_channel_leave_none_over() -> None:
    assert best_with_sum([3] * 100 + [2] * 100, 200) == [*range(66), 100]
    assert best_with_sum([3] * 100 + [2] * 100, 298) == [*range(98), 100, 101]
    assert best_with_sum([3] * 100 + [2] * 2, 299) == [*range(99), 100]
    assert best_with_sum([3] * 100, 200) == list(range(66))


@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_a_layer_that_dies_between_rounds_does_not_end_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, x = build("mlp")
    scores = CroPitS.channel_scores
    rounds = []

    def dying(scorer: CroPitS, run: Any, groups: Any) -> dict[str, torch.Tensor]:
        found = scores(scorer, run, groups)
        rounds.append(run)
        if len(rounds) == 1:
            return found
        return {name: (score + 1) * (name != "layers.1") for name, score in found.items()}

    monkeypatch.setattr(CroPitS, "channel_scores", dying)
    with pytest.warns(PaikernWarning, match=r"^layers\.1 \(round 2\): cropit_s scores all of the"):
        masks = pk.prune(net, "cropit_s", sparsity=0.7, data=(x, classes(net, x)))
    assert len(rounds) == 7
    assert sum(int(kept.sum()) for kept in masks.channels.values()) == nodes_kept(17, 0.7)


class AllButAlwaysDead(pk.scorers.L1Filters):
    """Scores that are 0 for the named groups in the rounds given for them, and none elsewhere."""

    name = "all_but"

    def channel_scores(self, run: Any, groups: Any) -> dict[str, torch.Tensor]:
        now = run.cache["now"] = run.cache.get("now", 0) + 1
        found = super().channel_scores(run, groups)
        return {n: s * (now not in DEAD_IN.get(n, ())) for n, s in found.items()}


DEAD_IN: dict[str, tuple[int, ...]] = {}


@pytest.mark.parametrize(
    ("dead", "named"),
    [
        ({}, None),
        ({"layers.3": (3,)}, r"^layers\.3 \(round 3\): all_but scores all"),
        ({"layers.3": (2, 3)}, r"^layers\.3 \(round 2\): all_but scores all"),
        (
            {"layers.1": (3,), "layers.3": (2,)},
            r"^layers\.3 \(round 2\), layers\.1 \(round 3\): all_but",
        ),
    ],
)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_group_that_dies_is_named_though_it_is_above_its_floor(
    dead: dict[str, tuple[int, ...]],
    named: str | None,
    scope: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{__name__}.DEAD_IN", dead)
    net, x = build("mlp")
    options = {"sparsity": 0.3, "rounds": 3, "schedule": "linear", "scope": scope}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        masks = pk.prune(net, AllButAlwaysDead(), example_inputs=x, apply=False, **options)
    found = [str(w.message) for w in told if "scores all" in str(w.message)]
    assert len(found) == (named is not None)
    assert named is None or re.search(named, found[0])
    assert min(int(kept.sum()) for kept in masks.channels.values()) > 1


def test_a_group_that_is_dead_from_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.DEAD_IN", {"layers.3": (1,)})
    net, x = build("mlp")
    with pytest.raises(ValueError, match=r"^layers\.3: all_but scores all of its channels 0"):
        pk.prune(net, AllButAlwaysDead(), sparsity=0.3, rounds=3, example_inputs=x)


class Pairs(nn.Module):
    """Two layers whose outputs are added: every channel stands for two nodes."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, channels), nn.Linear(4, channels)
        self.out = nn.Linear(channels, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out((self.a(x) + self.b(x)).tanh())


@pytest.mark.parametrize("removed", range(1, 11))
def test_a_number_that_cannot_be_made_up_is_told(removed: int) -> None:
    net, x = Pairs(), torch.ones(1, 4)
    given = {"amount": removed, "scope": "global", "example_inputs": x, "apply": False}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        masks = pk.prune(net, "l1_filters", **given)
    asked = 12 - removed
    kept = sum(int(mask.sum()) for mask in masks.channels.values())
    assert kept == asked - asked % 2
    found = [str(w.message) for w in told if "asks for" in str(w.message)]
    assert len(found) == asked % 2
    if found:
        assert found[0].startswith(f"{kept} nodes are kept where sparsity=")
        assert f" asks for {asked}: coupled layers" in found[0]
        assert "\n" not in found[0]
    assert masks.metadata["notes"] == [str(w.message) for w in told]


def test_rounds_on_the_way_are_not_told() -> None:
    net, x = Pairs(channels=5), torch.ones(1, 4)
    options = {"rounds": 3, "schedule": "linear", "scope": "global", "example_inputs": x}
    masks = pk.prune(net, "l1_filters", sparsity=0.6, apply=False, **options)  # 8, 6, 4 of 10
    assert masks.metadata["notes"] == []
    masks = pk.prune(net, "l1_filters", sparsity=0.4, apply=False, **options)  # 9 -> 8, 8, 6
    assert [row["density"] for row in masks.metadata["history"]] == [0.8, 0.8, 0.6]
    assert masks.metadata["notes"] == []
