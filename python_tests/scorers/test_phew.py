"""`pk.prune(model, "phew")`: counts, rules at the end, options, errors, published program."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern import ops
from paikern.errors import PaikernWarning, SparsityError
from paikern.pathgraph import trace
from paikern.pathgraph.units import walk_graph
from paikern.pathgraph.walks import flattened
from paikern.scorers.phew_published import published_walk_graph
from paikern.scorers.phew_reach import reachable_weights
from python_tests.pathgraph.helpers import state_of
from python_tests.pathgraph.walk_nets import make
from python_tests.small_runs import Untouched

X = torch.ones(1, 3, 32, 32)


def phew(model: nn.Module, sparsity: float, x: Tensor = X, **options: Any) -> pk.MaskSet:
    options = {"apply": False, "progress": False, **options}
    return pk.prune(model, "phew", sparsity=sparsity, example_inputs=x, **options)


@pytest.fixture(scope="module")
def resnet20() -> nn.Module:
    return pk.zoo.create("resnet20", seed=0)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.98, 0.995])
def test_resnet20_keeps_exactly_the_budget_on_paths(resnet20: nn.Module, sparsity: float) -> None:
    masks = phew(resnet20, sparsity)
    assert masks.kept == pk.budget.keep_count(270_896, sparsity)
    assert pk.analyze(resnet20, masks, example_inputs=X).effective_params == masks.kept
    assert masks.metadata["notes"] == []


@pytest.mark.parametrize(
    ("options", "walks"), [({}, 2070), ({"kernel_conserved": True}, 229)], ids=["taps", "kernels"]
)
def test_the_number_of_walks_is_that_of_the_published_program(
    resnet20: nn.Module, options: dict[str, Any], walks: int
) -> None:
    """Runs of that program on a ResNet-20 at 90 %; its generators are not seeded."""
    for variant in ("paper", "published"):
        for seed in range(3):
            masks = phew(resnet20, 0.9, exact=False, variant=variant, seed=seed, **options)
            assert masks.metadata["history"][-1]["walks"] == pytest.approx(walks, rel=0.1)


def test_the_excess_is_shorter_than_a_path(resnet20: nn.Module) -> None:
    for seed in range(5):
        kept = phew(resnet20, 0.9, exact=False, seed=seed).kept
        assert 27_090 <= kept < 27_090 + 20
    whole = phew(resnet20, 0.9, exact=False, kernel_conserved=True)
    assert 27_090 <= whole.kept < 27_090 + 19 * 9 + 1
    for name, mask in whole.items():
        kernels = mask.flatten(2) if mask.dim() > 2 else mask.unsqueeze(-1)
        assert torch.equal(kernels.any(-1), kernels.all(-1)), name


def test_the_seed_alone_decides(resnet20: nn.Module) -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 8):
            torch.set_num_threads(count)
            found.append(phew(resnet20, 0.9, seed=4))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]
    assert phew(resnet20, 0.9, seed=5) != found[0]


@pytest.mark.parametrize("name", ["residual", "attends"])
def test_the_backends_keep_the_same_weights(name: str) -> None:
    net, x = make(name)
    assert phew(net, 0.6, x, backend="reference") == phew(net, 0.6, x, backend="cpu")


def test_the_batches_do_not_matter(resnet20: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = phew(resnet20, 0.95)
    for most in (7, 333):
        monkeypatch.setattr("paikern.scorers.phew._MOST", most)
        assert phew(resnet20, 0.95) == expected


@pytest.mark.parametrize("name", ["chain", "residual", "dense", "grouped", "squeezed", "attends"])
def test_small_networks_of_every_kind(name: str) -> None:
    """Kept weights lie on paths of the true network where a kernel has no position to miss."""
    net, x = make(name)
    before = Untouched(net)
    masks = phew(net, 0.7, x, kernel_conserved=name != "attends")
    before.check()
    assert masks.kept == pk.budget.keep_count(masks.total, 0.7)
    top = pk.analyze(net, masks, example_inputs=x)
    assert top.effective_params >= masks.kept - 8  # of a kernel that was cut
    assert phew(net, 0.7, x, identity_skips=True).kept == masks.kept


@pytest.mark.parametrize("conv1d", [False, True])
def test_language_models_in_both_layouts(conv1d: bool) -> None:
    net = pk.zoo.create(
        "gpt2", layers=2, heads=2, dim=16, vocabulary=40, sequence=6, conv1d=conv1d, tied=False,
        seed=0,
    )  # fmt: skip
    x = pk.zoo.example_input(net)
    masks = phew(net, 0.8, x)
    assert masks.kept == pk.budget.keep_count(masks.total, 0.8)
    assert pk.analyze(net, masks, example_inputs=x).effective_params == masks.kept


def test_a_vision_transformer_and_a_resnet50() -> None:
    vit = pk.zoo.create(
        "vit_b_16", image_size=32, patch=8, layers=3, dim=24, heads=3, num_classes=10, seed=0
    )
    masks = phew(vit, 0.8)
    assert pk.analyze(vit, masks, example_inputs=X).effective_params == masks.kept
    net = pk.zoo.create("resnet50", seed=0)
    x = torch.ones(1, 3, 64, 64)
    masks = phew(net, 0.98, x)
    assert masks.kept == pk.budget.keep_count(25_502_912, 0.98)
    assert pk.analyze(net, masks, example_inputs=x).effective_params > 0.999 * masks.kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = pk.zoo.create("mlp", sizes=(20, 40, 10), seed=0).to(dtype)
    masks = phew(net, 0.8, torch.ones(1, 20, dtype=dtype))
    assert masks.kept == 240
    if dtype == torch.float64:
        assert phew(net.float(), 0.8, torch.ones(1, 20)) == masks


def test_masks_grow(resnet20: nn.Module) -> None:
    masks = None
    for sparsity in (0.98, 0.95, 0.9):
        larger = phew(resnet20, sparsity, grow_from=masks)
        assert larger.kept == pk.budget.keep_count(270_896, sparsity)
        if masks is not None:
            assert all(bool((larger[n] | ~masks[n]).all()) for n in masks)
        masks = larger
    as_tensors = phew(resnet20, 0.8, grow_from={n: masks[n] for n in masks})
    assert as_tensors == phew(resnet20, 0.8, grow_from=masks)
    with pytest.raises(SparsityError, match="its masks keep 27090 weights, more than the 5418"):
        phew(resnet20, 0.98, grow_from=masks)
    with pytest.raises(ValueError, match="grow_from: the model prunes no 'other'"):
        phew(resnet20, 0.8, grow_from={"other": torch.ones(2, dtype=torch.bool)})
    name = next(iter(masks))
    with pytest.raises(ValueError, match=rf"the mask of {name} is \[2\], the weight \[16, 3, 3, 3"):
        phew(resnet20, 0.8, grow_from={name: torch.ones(2, dtype=torch.bool)})


def test_less_than_one_path_is_cut_and_told(resnet20: nn.Module) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        masks = phew(resnet20, 1 - 7.5 / 270_896)
        whole = phew(resnet20, 1 - 7.5 / 270_896, exact=False)
    cut = [w for w in told if "no walk had few enough new weights to end on 8" in str(w.message)]
    assert len(cut) == 1
    assert masks.kept == 8
    assert 8 <= whole.kept <= 20
    assert pk.analyze(resnet20, whole, example_inputs=X).effective_params > 0


def test_weights_that_walks_cannot_reach() -> None:
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 3], [0, 1]]))
    x = torch.ones(1, 2)
    assert phew(net, 0.25, x)["weight"].tolist() == [[True, True], [False, True]]
    with pytest.raises(SparsityError) as error:
        phew(net, 1e-9, x)
    assert "3 of 4 are kept (density 0.75) after 2000 walks" in str(error.value)
    assert "can reach 3 of 4 weights" in str(error.value)


def test_reachable_weights_are_those_that_walks_find() -> None:
    for name in ("residual", "dense", "grouped", "attends", "class_token"):
        net, x = make(name)
        with torch.no_grad():
            for number, p in enumerate(net.parameters()):
                generator = torch.Generator().manual_seed(number)
                p[torch.rand(p.shape, generator=generator) < 0.5] = 0
        state = state_of(net)
        shapes = {n: tuple(p.shape) for n, p in net.named_parameters() if p.dim() > 1}
        shapes.pop("token", None)
        for skips in (False, True):
            graph = walk_graph(trace(net, x), state, identity_skips=skips)
            reach = reachable_weights(graph, state, shapes)
            total = sum(p.numel() for n, p in net.named_parameters() if n in shapes)
            assert reach < total
            with pytest.raises(SparsityError, match=rf"can reach {reach} of {total} weights") as e:
                phew(net, 1e-9, x, identity_skips=skips)
            assert int(str(e.value).split(" new weights: ")[1].split()[0]) > 0.97 * reach


def test_layers_of_zeros_are_walked_uniformly_and_named() -> None:
    net = pk.zoo.create("mlp", sizes=(6, 10, 10, 4), seed=0)
    with torch.no_grad():
        net.layers[3].weight.zero_()
    with pytest.warns(PaikernWarning, match=r"from which walks go on uniformly, in layers\.3\."):
        masks = phew(net, 0.5, torch.ones(1, 6))
    assert masks.kept == 100
    assert masks.kept_by_layer["layers.3.weight"] > 20


def test_a_layer_left_dense_is_passed_without_counting() -> None:
    net = pk.zoo.create("mlp", sizes=(6, 10, 10, 4), seed=0)
    masks = phew(net, 0.5, torch.ones(1, 6), ignore=["layers.3"])
    assert set(masks) == {"layers.1.weight", "layers.5.weight"}
    assert masks.kept == 50


def test_one_layer_and_single_units() -> None:
    assert phew(nn.Linear(5, 3), 0.6, torch.ones(1, 5)).kept == 6
    narrow = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    assert phew(narrow, 0.5, torch.ones(1, 1)).kept == 4


def test_one_budget_for_all_layers(resnet20: nn.Module) -> None:
    with pytest.raises(ValueError, match="scope: phew walks through all layers"):
        phew(resnet20, 0.9, scope="erk")


def test_progress_counts_weights_and_can_be_interrupted(resnet20: nn.Module) -> None:
    seen: list[tuple[int, int]] = []
    phew(resnet20, 0.9, progress=lambda done, total, values: seen.append((done, total)))
    assert seen[-1] == (27_090, 27_090)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def stop(done: int, total: int, values: dict[str, float]) -> None:
        raise KeyboardInterrupt

    before = {n: p.clone() for n, p in resnet20.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        phew(resnet20, 0.9, progress=stop, apply=True)
    assert all(torch.equal(p, before[n]) for n, p in resnet20.named_parameters())


# --- the published program -------------------------------------------------------------------


def test_published_jumps_to_the_shortcut_a_layer_too_early(resnet20: nn.Module) -> None:
    state = state_of(resnet20)
    shapes = {n: tuple(p.shape) for n, p in resnet20.named_parameters() if p.dim() > 1}
    graph = published_walk_graph(resnet20, state, shapes)
    names = [n.step.parameter for n in graph.nodes if n.step is not None]
    layer = {id(n): names.index(n.step.parameter) for n in graph.nodes if n.step is not None}
    onward: set[tuple[int, int]] = set()
    back: set[tuple[int, int]] = set()
    for node in graph.nodes[2:-1]:
        for found, pair in ((onward, node.slots[0].onward), (back, node.slots[0])):
            assert pair is not None
            for other in graph.nodes[1:-1]:
                inside = (pair.sources >= other.base) & (pair.sources < other.base + other.units)
                if bool(inside.any()):
                    found.add((layer[id(other)], layer[id(node)]))
    shortcuts = [i for i, name in enumerate(names) if shapes[name][2:] == (1, 1)]
    assert shortcuts == [9, 16]
    chain = {(a, a + 1) for a in range(21) if not {a, a + 1} & {9, 16}} | {(8, 10), (15, 17)}
    chain |= {(9, 10), (16, 17)}
    assert onward == chain | {(5, 9), (12, 16)}
    assert back == chain | {(6, 9), (13, 16)}


def test_published_walks_leave_three_layers_out_half_of_the_time(resnet20: nn.Module) -> None:
    state = state_of(resnet20)
    shapes = {n: tuple(p.shape) for n, p in resnet20.named_parameters() if p.dim() > 1}
    w = flattened(published_walk_graph(resnet20, state, shapes), state, shapes)
    tables = ops.phew_tables(w.weights, w.geometry, w.table_size)
    walks = ops.phew_walks(
        w.weights, tables, w.geometry, w.graph, seed=1, first=0, count=20_000, width=w.width
    )
    begins = torch.tensor([8 * first for first, _ in w.parts.values()])
    layers = torch.searchsorted(begins, walks, right=True) - 1
    forwards, backwards = layers[0::2], layers[1::2]
    for shortcut in (9, 16):
        for found, passed in ((forwards, shortcut - 4), (backwards, shortcut + 1)):
            taken = ((found[:, :-1] == passed) & (found[:, 1:] == shortcut)).any(1).double()
            arrives = (found == passed).any(1).double()
            assert float(taken.sum() / arrives.sum()) == pytest.approx(0.5, abs=0.02)
        left_out = (forwards[:, :, None] == torch.arange(shortcut - 3, shortcut)).any(1)
        assert torch.equal(left_out[:, 0], left_out.all(1))
        assert float(left_out[:, 0].double().mean()) == pytest.approx(0.5, abs=0.02)


def test_published_keeps_the_last_walk_and_is_ours_on_a_chain(resnet20: nn.Module) -> None:
    assert phew(resnet20, 0.9, variant="published").kept >= 27_090
    chain = pk.zoo.create("vgg16_bn", num_classes=10, seed=0)
    published = phew(chain, 0.99, variant="published")
    assert published == phew(chain, 0.99, exact=False)  # no shortcut: the same walks


def test_published_refuses_what_the_program_breaks_on() -> None:
    with pytest.raises(ValueError, match="bottlenecks, grouped convolutions"):
        phew(pk.zoo.create("resnet50", seed=0), 0.9, variant="published")
    net, x = make("grouped")
    with pytest.raises(ValueError, match="square kernels"):
        phew(net, 0.5, x, variant="published")
