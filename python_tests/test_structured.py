"""`pattern=` from end to end: counts, choices, what is refused, and torch's own 2:4 layout."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import paikern as pk
from paikern.cli import main
from paikern.errors import NonFiniteScoreError, PaikernWarning, SparsityError
from paikern.pattern import NM, Layout, parse_pattern
from paikern.scores import Dense, Factored, Scores
from paikern.structured import deviations
from python_tests.ops.pattern_cases import best_of_groups, mean_of_blocks
from python_tests.small_runs import METHODS, Net, net, prune


def dense(shapes: dict[str, tuple[int, ...]], layouts: dict[str, Layout] | None = None) -> Scores:
    return Scores(
        {n: Dense(torch.randn(s), absolute=True) for n, s in shapes.items()}, shapes, layouts
    )


def best_blocks(scores: Scores, counts: int, pattern: str) -> dict[str, Tensor]:
    """Blocks by Python's sort of their means until they hold `counts` weights."""
    parsed = parse_pattern(pattern)
    ranked, masks = [], {}
    for order, name in enumerate(scores):
        values, shape = scores.dense(name, torch.float64), scores.shapes[name]
        block = parsed.block(shape, scores.layouts[name])
        means = mean_of_blocks(values, block, False)
        masks[name] = torch.zeros(shape[0], math.prod(shape[1:]), dtype=torch.bool)
        for i, row in enumerate(means.tolist()):
            for j, mean in enumerate(row):
                ranked.append((-mean, order, i, j, name, block))
    kept = 0
    for _, _, i, j, name, block in sorted(ranked):
        if kept >= counts:
            break
        part = masks[name][i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        part[:] = True
        kept += part.numel()
    return {name: mask.reshape(scores.shapes[name]) for name, mask in masks.items()}


SHAPES = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20))
    | st.tuples(st.integers(1, 8), st.integers(1, 8), st.just(3), st.just(3)),
    min_size=1,
    max_size=3,
)
PATTERNS = ("block:2x3", "block:4x4", "block:16x16", "row", "column", "kernel")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(SHAPES, st.sampled_from(PATTERNS), st.floats(0, 0.99), st.integers(0, 99), st.booleans())
def test_blocks_equal_a_sort_of_their_means(
    shapes: list[tuple[int, ...]], pattern: str, sparsity: float, seed: int, ties: bool
) -> None:
    torch.manual_seed(seed)
    named = {f"w{i}": shape for i, shape in enumerate(shapes)}
    scores = dense(named)
    if ties:
        scores = Scores({n: Dense(scores[n].values.abs().round()) for n in scores}, named)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PaikernWarning)
        masks = pk.select(scores, sparsity=sparsity, pattern=pattern)
    wanted = best_blocks(scores, pk.budget.keep_count(scores.total, sparsity), pattern)
    for name in scores:
        assert torch.equal(masks[name], wanted[name])
    assert masks.metadata["pattern"] == pattern
    assert masks.metadata["achieved_sparsity"] == masks.sparsity
    assert not deviations(masks, parse_pattern(pattern), scores.layouts)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SHAPES, st.integers(2, 9), st.integers(0, 99), st.data())
def test_groups_equal_sorted_groups(
    shapes: list[tuple[int, ...]], m: int, seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    n = data.draw(st.integers(1, m - 1))
    named = {f"w{i}": shape for i, shape in enumerate(shapes)}
    layouts = {name: Layout(data.draw(st.booleans())) for name in named}
    scores = dense(named, layouts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PaikernWarning)
        masks = pk.select(scores, pattern=f"{n}:{m}")
    for name, shape in named.items():
        dim = 0 if layouts[name].transposed else 1
        if shape[dim] < m:
            assert bool(masks[name].all())
        else:
            wanted = best_of_groups(scores[name].values, n, m, dim, True)
            assert torch.equal(masks[name], wanted)
        assert int(masks[name].sum()) == NM(n, m).kept(shape, layouts[name])
    assert not deviations(masks, NM(n, m), layouts)


def test_two_of_four_of_a_model() -> None:
    model = net()
    with pytest.warns(PaikernWarning, match=r"leaves layers with fewer dense: stem\.weight \(1\)"):
        masks = pk.prune(model, "magnitude", pattern="2:4")
    assert masks.kept_by_layer == {"stem.weight": 72, "body.weight": 288, "head.weight": 20}
    assert masks.metadata["sparsity"] == 0.5
    assert masks.metadata["pattern"] == "2:4"
    assert masks.metadata["achieved_sparsity"] == pytest.approx(1 - 380 / 688)
    groups = (model.body.weight != 0).movedim(1, -1).unflatten(-1, (-1, 4)).sum(-1)
    assert bool((groups == 2).all())
    masks.verify(model)


def test_patterns_of_transposed_and_grouped_layers() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.ConvTranspose1d(8, 5, 2),
        nn.Conv2d(8, 4, 3, groups=2),
    )
    masks = pk.prune(model, "magnitude", pattern="1:4", apply=False)
    split = masks["0.weight"].unflatten(0, (2, 4))  # [group, in, out / groups, 3, 3]
    assert bool((split.sum(1) == 1).all())
    assert bool((masks["1.weight"].unflatten(0, (2, 4)).sum(1) == 1).all())
    assert bool((masks["2.weight"].sum(1) == 1).all())
    rows = pk.prune(model, "magnitude", sparsity=0.5, pattern="row", apply=False)
    whole = rows["0.weight"].unflatten(0, (2, 4)).movedim(2, 1).flatten(2)  # a row an output
    assert bool((whole.all(-1) == whole.any(-1)).all())
    columns = pk.prune(model, "magnitude", sparsity=0.5, pattern="column", apply=False)
    whole = columns["2.weight"].unflatten(0, (2, 2)).movedim(2, 1).flatten(2)  # a row an input
    assert bool((whole.all(-1) == whole.any(-1)).all())


@pytest.mark.filterwarnings("ignore:layer collapse:paikern.errors.PaikernWarning")
def test_factored_scores_equal_dense_ones() -> None:
    w, a, g = torch.randn(24, 36), torch.rand(36), torch.rand(24)
    allowed = pk.ops.expand_blocks(torch.tensor([0b111011], dtype=torch.uint8), (24, 36), (8, 18))
    entry = Factored(w, 2, a, g, 3, allowed)
    shapes = {"w": (24, 36), "v": (24, 36)}
    both = {"w": entry, "v": Factored(w, 1, a, g, 0)}
    full = {"w": entry.dense(-1.0), "v": both["v"].dense()}
    for kwargs in (
        {"pattern": "2:4"},
        {"pattern": "3:10"},
        {"pattern": "block:8x18", "sparsity": 0.7},
        {"pattern": "row", "sparsity": 0.5},
        {"pattern": "column", "sparsity": 0.8, "scope": "local"},
    ):
        masks = pk.select(Scores(both, shapes), **kwargs)
        assert masks == pk.select(Scores(full, shapes), **kwargs)


@pytest.mark.parametrize("pattern", ["2:4", "1:5", "block:4x4", "row", "kernel"])
def test_scores_from_maps_equal_dense_ones(pattern: str) -> None:
    shapes = {"conv": (8, 12, 3, 3), "linear": (10, 16)}
    conv = Factored(
        torch.randn(8, 12, 3, 3), 1, torch.rand(2, 12, 6, 6), torch.rand(2, 8, 6, 6), 5,
        pk.ops.topk_mask(torch.rand(864), 500)[0], ([1, 1], [1, 1], [1, 1], 1),
    )  # fmt: skip
    linear = Factored(torch.randn(10, 16), 2, torch.rand(3, 16), torch.rand(3, 10), 8)
    kwargs = {"pattern": pattern, **({} if pattern[1] == ":" else {"sparsity": 0.4})}
    found = pk.select(Scores({"conv": conv, "linear": linear}, shapes), **kwargs)
    full = {"conv": conv.dense(-1.0), "linear": linear.dense()}
    assert found == pk.select(Scores(full, shapes), **kwargs)


def test_blocks_of_layers_with_exponents_compare_exactly() -> None:
    shapes = {"a": (2, 4), "b": (2, 4)}
    entries = {"a": Dense(torch.full((2, 4), 1.5), -900), "b": Dense(torch.ones(2, 4), 900)}
    masks = pk.select(
        Scores(entries, shapes), sparsity=0.5, pattern="block:2x2", on_collapse="floor"
    )
    assert masks.kept_by_layer == {"a": 4, "b": 4}
    with pytest.warns(PaikernWarning, match="a keeps no weight"):
        masks = pk.select(Scores(entries, shapes), sparsity=0.5, pattern="block:2x2")
    assert masks.kept_by_layer == {"a": 0, "b": 8}


@pytest.mark.filterwarnings("ignore:layer collapse:paikern.errors.PaikernWarning")
def test_equal_blocks_keep_exactly_the_count() -> None:
    scores = dense({"a": (32, 64), "b": (64, 32)})
    for sparsity in (0.0, 0.25, 0.5, 0.9, 0.99):
        masks = pk.select(scores, sparsity=sparsity, pattern="block:8x8")
        assert masks.kept == 64 * (64 - math.floor(64 * sparsity))
    assert pk.select(scores, sparsity=0.75, pattern="block:8x8").kept == 1024


def test_collapse_by_blocks() -> None:
    values = {"a": torch.ones(4, 6), "b": torch.full((4, 6), 0.1)}
    scores = Scores({n: Dense(v) for n, v in values.items()}, dict.fromkeys(values, (4, 6)))
    with pytest.raises(SparsityError, match="layer collapse: b would keep no weight"):
        pk.select(scores, sparsity=0.5, pattern="row", on_collapse="raise")
    masks = pk.select(scores, sparsity=0.5, pattern="row", on_collapse="floor")
    assert masks.kept_by_layer == {"a": 18, "b": 6}
    with pytest.raises(SparsityError, match="at least one row of weights for each of 1 layers"):
        pk.select(scores, sparsity=0.95, pattern="row", on_collapse="floor")


@pytest.mark.parametrize("scope", ["global", "local", "uniform", "erk", "lamp"])
def test_scopes_of_blocks(scope: str) -> None:
    model = pk.zoo.create("lenet300", seed=0)
    masks = pk.prune(
        model, "magnitude", sparsity=0.9, pattern="block:4x4", scope=scope, apply=False
    )
    budgets = pk.budget.layer_budget(
        masks.shapes,
        0.9,
        scope,
        scores={n: p.detach() for n, p in model.named_parameters() if n in masks},
    )
    if isinstance(budgets, int):
        assert budgets <= masks.kept < budgets + 16
    else:
        for kept, count in zip(masks.kept_by_layer.values(), budgets, strict=True):
            assert count <= kept < count + 16


@pytest.mark.filterwarnings("ignore:pattern=:paikern.errors.PaikernWarning")
@pytest.mark.filterwarnings("ignore:layer collapse:paikern.errors.PaikernWarning")
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "block:4x4", "row", "column", "kernel"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "dpai"])
def test_every_method_that_scores_weights_takes_every_pattern(method: str, pattern: str) -> None:
    options = {"sparsity": None} if ":" in pattern and "x" not in pattern else {"sparsity": 0.3}
    masks = prune(net(), method, pattern=pattern, apply=False, **options)
    assert not deviations(masks, parse_pattern(pattern), {})
    assert masks.metadata["history"][-1]["density"] == pytest.approx(1 - masks.sparsity)
    assert (
        prune(net(), method, pattern=pattern, apply=False, backend="reference", **options) == masks
    )


@pytest.mark.filterwarnings("ignore:pattern=:paikern.errors.PaikernWarning")
def test_rounds_only_take_away() -> None:
    """Every round's groups lie within those before, as its scores mark what was pruned."""
    one = prune(net(), "synflow", pattern="3:4", sparsity=None, rounds=1, apply=False)
    two = prune(
        net(), "synflow", pattern="2:4", sparsity=None, rounds=2, schedule="linear", apply=False
    )
    assert two.metadata["history"][0]["density"] == pytest.approx(1 - one.sparsity)
    assert not any(bool((two[name] & ~one[name]).any()) for name in two)


def test_dpai_refuses_patterns_and_its_scores_take_them() -> None:
    with pytest.raises(
        ValueError, match="pattern='2:4': dpai trains its scores for single weights"
    ):
        prune(net(), "dpai", pattern="2:4", sparsity=None)
    options = METHODS["dpai"]
    scores = pk.score(net(), "dpai", sparsity=0.5, **options)
    with pytest.warns(PaikernWarning, match="stem"):
        masks = pk.select(scores, pattern="2:4")
    assert not deviations(masks, NM(2, 4), {})


def test_scores_know_the_layout_of_their_layers() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(8, 4, 1))
    masks = pk.select(pk.score(model, "magnitude"), pattern="2:8")
    assert masks == pk.prune(model, "magnitude", pattern="2:8", apply=False)
    assert bool((masks["0.weight"].sum(0) == 2).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.6}, r"sparsity=0\.6 and pattern='2:4' do not fit: .* removes 0\.5"),
        ({"density": 0.25}, r"density=0\.25 and pattern='2:4' do not fit"),
        ({"compression": 4}, r"compression=4 and pattern='2:4' do not fit"),
        ({"sparsity": 0.5, "density": 0.5}, "exactly one of sparsity, density"),
        ({"scope": "erk"}, "scope='erk': pattern='2:4' fixes what every layer keeps"),
        ({"selection": "published"}, "selection='published' is a rule for single weights"),
        ({"pattern": "2:3:4"}, "unknown pattern '2:3:4'"),
        ({"pattern": "row"}, "exactly one of sparsity, density, amount, compression; got none"),
        ({"pattern": "block:0x4", "sparsity": 0.5}, "at least one row and one column"),
    ],
)
def test_refusals_leave_the_model_alone(options: dict, message: str) -> None:
    model = net()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as caught:
        pk.prune(model, "magnitude", **{"pattern": "2:4", **options})
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.filterwarnings("ignore:pattern=:paikern.errors.PaikernWarning")
@pytest.mark.parametrize(
    "given", [{"sparsity": 0.5}, {"density": 0.5}, {"compression": 2}, {"amount": 344}]
)
def test_a_matching_sparsity_may_be_given(given: dict) -> None:
    assert pk.prune(net(), "magnitude", pattern="2:4", apply=False, **given).kept == 380


def test_patterns_need_two_dimensions_and_numbers() -> None:
    flat = Scores({"w": Dense(torch.rand(6))}, {"w": (6,)})
    with pytest.raises(
        ValueError, match=r"pattern='2:4' needs weights .* 'w' has the shape \(6,\)"
    ):
        pk.select(flat, pattern="2:4")
    values = torch.rand(4, 8)
    values[1, 2] = math.nan
    scores = Scores({"fc.weight": Dense(values)}, {"fc.weight": (4, 8)})
    for kwargs in ({"pattern": "2:4"}, {"pattern": "row", "sparsity": 0.5}):
        with pytest.raises(NonFiniteScoreError, match=r"fc\.weight hold NaN"):
            pk.select(scores, **kwargs)


def test_deviations_are_found() -> None:
    scores = dense({"a": (8, 11), "b": (6, 4, 3, 3)})
    masks = dict(pk.select(scores, pattern="2:4"))
    masks["a"][3, :3] = True
    assert deviations(masks, NM(2, 4), {}) == ["a"]
    blocks = dict(pk.select(scores, sparsity=0.3, pattern="kernel"))
    blocks["b"][2, 1, 0, 0] = ~blocks["b"][2, 1, 0, 0]
    assert deviations(blocks, parse_pattern("kernel"), {}) == ["b"]


# --- torch's own 2:4 layout --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_torch_compresses_what_2_4_keeps(dtype: torch.dtype, method: str) -> None:
    """Its conversion holds two values of four: it restores a weight only if no group has more."""
    model = nn.Sequential(nn.Linear(128, 64, bias=False), nn.Linear(64, 96, bias=False)).to(dtype)
    dense_weight = model[0].weight.detach().clone()
    pk.prune(model, method, pattern="2:4")
    for layer in model:
        weight = layer.weight.detach()
        values, meta = sparse_semi_structured_from_dense_cutlass(weight)
        assert values.shape == (weight.shape[0], weight.shape[1] // 2)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight)
    values, meta = sparse_semi_structured_from_dense_cutlass(dense_weight)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), dense_weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that this build of torch can use")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torch_takes_2_4_on_the_gpu(dtype: torch.dtype) -> None:
    layer = nn.Linear(256, 128, bias=False).to(dtype)
    pk.prune(layer, "magnitude", pattern="2:4")
    weight = layer.weight.detach().cuda()
    sparse = torch.sparse.to_sparse_semi_structured(weight)
    assert torch.equal(sparse.to_dense(), weight)
    x = torch.randn(64, 256, dtype=dtype, device="cuda")
    torch.testing.assert_close(
        torch.nn.functional.linear(x, sparse), torch.nn.functional.linear(x, weight)
    )


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--pattern", "2:4"],
        ["--pattern", "block:16x16", "--sparsity", "0.5"],
        ["--pattern", "row", "--sparsity", "0.5", "--scope", "local"],
        ["--pattern", "block:8x8", "--density", "0.3", "--scope", "erk"],
    ],
    ids=lambda options: options[1],
)
def test_command_prunes_and_verifies(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", "lenet300"]
    run = [
        "prune",
        *model,
        "--method",
        "magnitude",
        *options,
        "--out",
        str(tmp_path),
        "--no-report",
    ]
    assert main(run) == 0
    file = str(tmp_path / "masks.safetensors")
    assert main(["verify", file, *model]) == 0
    assert f"pattern {options[1]}" in capsys.readouterr().out
    masks = pk.load_masks(file)
    assert masks.metadata["pattern"] == options[1]
    broken = {name: masks[name].clone() for name in masks}
    broken["layers.3.weight"][5] = torch.arange(300) < 7
    broken["layers.3.weight"][6:50] = False
    pk.MaskSet.from_bool(broken, masks.metadata).save(file)
    assert main(["verify", file, *model]) == 1
    err = capsys.readouterr().err
    assert f"pattern {options[1]}: failed: layers.3.weight" in err
    assert "number of kept weights: failed" in err


def test_command_refuses_another_sparsity(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["prune", "--model", "lenet300", "--method", "magnitude", "--pattern", "2:4"]
    assert main([*run, "--sparsity", "0.9"]) == 2
    assert "sparsity=0.9 and pattern='2:4' do not fit" in capsys.readouterr().err


def test_attached_masks_keep_the_pattern_while_training() -> None:
    model: Net = net()
    with pytest.warns(PaikernWarning, match="stem"):
        masks = pk.prune(model, "magnitude", pattern="2:4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.attach(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
    found = {"body.weight": model.body.weight != 0, "head.weight": model.head.weight != 0}
    assert not deviations(found, NM(2, 4), {})
