"""Channel scores against gates that are in the model, and the selection they lead to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from python_tests.channel_nets import COUPLED, build
from python_tests.oracles import channels as oracle

NETS = ["mlp", "vgg", "residual", "dense", "mobile", "gated", "upsampling", "transformer"]


def data_for(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    net, x = build(name)
    classes = 3 if name in ("mlp", "transformer") else 4
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(x.shape, generator=generator),
            torch.randint(0, classes, (len(x),), generator=generator),
        )
        for _ in range(3)
    ]
    return net, batches


def by_group(name: str, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        group[0]: torch.stack([scores[layer] for layer in group]).sum(0) for group in COUPLED[name]
    }


def wanted(method: str, name: str, options: dict[str, str]) -> dict[str, Tensor]:
    net, batches = data_for(name)
    names = [layer for group in COUPLED[name] for layer in group]
    gated = oracle.Gated(copy.deepcopy(net), names)
    if method == "snap":
        return by_group(name, gated.snap(batches))
    return by_group(name, gated.crop(batches, by_gates=options.get("gates") == "slides"))


METHODS = [("snap", {}), ("crop_s", {}), ("crop_s", {"gates": "slides"})]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("method", "options"), METHODS, ids=["snap", "crop_s", "slides"])
@pytest.mark.parametrize("name", NETS)
def test_scores_are_those_of_real_gates(
    name: str, method: str, options: dict[str, str], dtype: torch.dtype
) -> None:
    net, batches = data_for(name)
    net = net.to(dtype)
    found = pk.score(net, method, data=[(x.to(dtype), y) for x, y in batches], **options)
    for group, expected in wanted(method, name, options).items():
        score = found.dense(f"{group}.weight", torch.float64)
        # What float32 makes of a sum of gradients is relative to the terms, not to what is left.
        bound = (1e-9 if dtype == torch.float64 else 1e-5) * float(expected.abs().max())
        assert float((score - expected).abs().max()) <= bound, group


@pytest.mark.parametrize(("method", "options"), METHODS, ids=["snap", "crop_s", "slides"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_kept_channels_are_those_of_the_oracle(
    name: str, method: str, options: dict[str, str]
) -> None:
    net, batches = data_for(name)
    masks = pk.prune(net, method, sparsity=0.6, data=batches, **options)
    scores = wanted(method, name, options)
    nodes = {group[0]: len(group) for group in COUPLED[name]}
    total = sum(nodes[group] * len(values) for group, values in scores.items())
    expected = oracle.select(scores, nodes, oracle.nodes_kept(total, 0.6))
    for group in COUPLED[name]:
        for layer in group:
            assert masks.channels[f"{layer}.weight"].tolist() == expected[group[0]], layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "resnet20"])
def test_gate_decorators_scores_are_those_of_gated_norms(name: str, dtype: torch.dtype) -> None:
    net, batches = data_for(name)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                norm.weight[1] = 0.0  # its shift would be infinite
                norm.weight[2] = 0.01  # its shift is cut off at 10
    gates = oracle.gate_decorators(copy.deepcopy(net), batches)
    net = net.to(dtype)
    found = pk.score(net, "gate_decorators", data=[(x.to(dtype), y) for x, y in batches])
    readers = {
        "residual": {"stem.0": ["stem.1", "second.2"], "first.0.0": ["first.0.1"]},
        "dense": {"stem": ["norms.0", "norms.1", "norms.2"]},
        "mobile": {"0.0": ["0.1", "1.1"], "2.0": ["2.1", "4.1"]},
        "resnet20": {
            "conv1": ["bn1", *(f"layer1.{block}.bn2" for block in range(3))],
            "layer3.1.conv1": ["layer3.1.bn1"],
        },
    }
    for layer, norms in readers[name].items():
        expected = sum(gates[norm][: len(gates[norms[0]])] for norm in norms)
        score = found.dense(f"{layer}.weight", torch.float64)
        bound = (1e-9 if dtype == torch.float64 else 1e-5) * float(expected.max())
        assert float((score - expected).abs().max()) <= bound, layer


def test_l1_filters_adds_up_what_makes_a_channel() -> None:
    net, x = build("upsampling")
    found = pk.score(net, "l1_filters", example_inputs=x)
    torch.testing.assert_close(found.dense("0.0.weight"), net[0][0].weight.abs().sum((1, 2, 3)))
    torch.testing.assert_close(found.dense("1.weight"), net[1].weight.abs().sum((0, 2, 3)))
    net, x = build("residual")
    sums = sum(m.weight.abs().sum((1, 2, 3)) for m in (net.stem[0], net.first[1], net.second[1]))
    torch.testing.assert_close(
        pk.score(net, "l1_filters", example_inputs=x).dense("stem.0.weight"), sums
    )


def test_earlybird_adds_up_the_norms_that_read_a_channel() -> None:
    net, x = build("dense")
    found = pk.score(net, "earlybird", example_inputs=x)
    sums = sum(norm.weight.abs()[:6] for norm in net.norms)
    torch.testing.assert_close(found.dense("stem.weight"), sums)
    torch.testing.assert_close(found.dense("convs.1.weight"), net.norms[2].weight.abs()[10:14])
    assert "convs.2.weight" not in found  # no norm reads the last of them


@pytest.mark.parametrize(
    ("method", "options"),
    [*METHODS, ("gate_decorators", {"mode": "eval"}), ("l1_filters", {}), ("earlybird", {})],
    ids=["snap", "crop_s", "slides", "gate_decorators", "l1_filters", "earlybird"],
)
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_a_masked_network_scores_as_the_smaller_one(
    name: str, method: str, options: dict[str, str]
) -> None:
    pytest.importorskip("torch_pruning")
    net, batches = data_for(name)
    net = net.double()
    given = {"data": [(x.double(), y) for x, y in batches]}
    x = given["data"][0][0]
    masks = pk.prune(net, "random_s", sparsity=0.5, example_inputs=x, seed=2)
    small = pk.shrink(net, masks, example_inputs=x)
    masked = pk.score(net, method, masks=masks, **given, **options)
    expected = pk.score(small, method, **given, **options)
    for layer in expected:
        kept = masks.channels[layer]
        score = masked.dense(layer, torch.float64)[kept]
        torch.testing.assert_close(score, expected.dense(layer, torch.float64))


def test_gradients_of_two_batches_may_cancel() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    x = torch.tensor([[1.0, 2.0]])
    opposite = [(x, torch.zeros(1, 1)), (x, torch.ones(1, 1))]

    def difference(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((1 - 2 * targets) * outputs).sum()

    with pytest.raises(ValueError, match="scores all of its channels 0"):
        pk.prune(net, "snap", sparsity=0.5, data=opposite, loss_fn=difference)
    pk.prune(net, "snap", sparsity=0.5, data=opposite[:1], loss_fn=difference)


@pytest.mark.parametrize("method", ["snap", "crop_s", "cropit_s", "gate_decorators"])
@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
@pytest.mark.parametrize("fails", [False, True], ids=["done", "error"])
def test_scoring_leaves_the_model_as_it_was(method: str, fails: bool) -> None:
    net, batches = data_for("residual")
    net.train()
    net.stem[1].eval()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    net.stem[0].weight.grad = torch.ones_like(net.stem[0].weight)
    torch.manual_seed(5)
    random = torch.get_rng_state()

    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * torch.nan

    if fails:
        with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
            pk.prune(net, method, sparsity=0.5, data=batches, loss_fn=broken)
    else:
        pk.prune(net, method, sparsity=0.5, data=batches, apply=False)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(net.stem[0].weight.grad, torch.ones_like(net.stem[0].weight))
    assert all(p.grad is None for p in net.parameters() if p is not net.stem[0].weight)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("masked", [False, True])
def test_costly_channels_lose_by_eta(masked: bool) -> None:
    """Maps of 8 x 8 pixels for the group of the stem, which two norms read, and for the others."""
    net, batches = data_for("residual")
    x, masks = batches[0][0], None
    live = {"stem.0": 8, "first.0.0": 6, "second.0.0": 5}
    if masked:
        masks = pk.prune(net, "random_s", sparsity=0.5, example_inputs=x)
        live = {"stem.0": 4, "first.0.0": 3, "second.0.0": 3}
    given = {"data": batches, "masks": masks}
    plain = pk.score(net, "gate_decorators", **given)
    found = pk.score(net, "gate_decorators", eta=0.01, **given)
    for layer, norms in {"stem.0": 2, "first.0.0": 1, "second.0.0": 1}.items():
        expected = plain.dense(f"{layer}.weight", torch.float64) - 0.01 * norms * 64 * live[layer]
        torch.testing.assert_close(found.dense(f"{layer}.weight", torch.float64), expected)


@pytest.mark.filterwarnings("ignore::paikern.PaikernWarning")
def test_eta_moves_the_choice_to_small_maps() -> None:
    """A stage of wide maps and one of a quarter of them: with a large eta the first one goes."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    options = {"sparsity": 0.4, "data": (x, y), "apply": False, "minimal_ratio": 0.0}
    masks = pk.prune(net, "gate_decorators", eta=1e3, **options)
    kept = {name: int(mask.sum()) for name, mask in masks.channels.items()}
    assert kept == {"0.weight": 2, "4.weight": 6}
    net[1].weight.data.zero_()
    with pytest.raises(ValueError, match="0: gate_decorators scores all of its channels 0"):
        pk.prune(net, "gate_decorators", eta=1e3, **options)
