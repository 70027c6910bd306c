"""MaskSet as a mapping, on models, and beside torch.nn.utils.prune."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from paikern import zoo
from paikern._names import strip_wrappers
from paikern.errors import MaskFormatError, PaikernError
from paikern.masks import MaskSet
from paikern.prunable import prunable_parameters

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


def random_masks(model: nn.Module, density: float = 0.3, seed: int = 0) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    found = prunable_parameters(model)
    return MaskSet.from_bool(
        {n: torch.rand(p.shape, generator=generator) < density for n, p in found.items()}
    )


def mlp(seed: int = 0) -> nn.Module:
    return zoo.create("mlp", sizes=(7, 5, 3), seed=seed)


# --- the mapping ---------------------------------------------------------------------------------


def test_by_hand() -> None:
    a = torch.tensor([[True, False, True], [False, False, True]])
    masks = MaskSet.from_bool({"a": a, "b": torch.zeros(9, dtype=torch.bool)}, {"seed": 3})
    assert list(masks) == ["a", "b"]
    assert len(masks) == 2
    assert torch.equal(masks["a"], a)
    assert masks.packed("a").tolist() == [0b100101]
    assert masks.packed("b").tolist() == [0, 0]
    assert masks.kept_by_layer == {"a": 3, "b": 0}
    assert (masks.kept, masks.total, masks.sparsity) == (3, 15, 0.8)
    assert masks.shapes == {"a": (2, 3), "b": (9,)}
    assert masks.metadata == {"seed": 3}
    assert "a" in masks
    assert "c" not in masks


@given(st.dictionaries(st.text(min_size=1), shapes, max_size=4), st.integers(0, 2**32))
def test_counts_and_bytes(layout: dict[str, tuple[int, ...]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    given_masks = {
        name: torch.rand(shape, generator=generator) < 0.5 for name, shape in layout.items()
    }
    packed_length = {name: math.ceil(m.numel() / 8) for name, m in given_masks.items()}
    stripped = {strip_wrappers(name) for name in given_masks}
    if len(stripped) < len(given_masks):
        return
    masks = MaskSet.from_bool(given_masks)
    for name, mask in given_masks.items():
        key = strip_wrappers(name)
        assert masks.packed(key).numel() == packed_length[name]
        assert torch.equal(masks[key], mask)
        assert masks.kept_by_layer[key] == int(mask.sum())
    assert masks.total == sum(m.numel() for m in given_masks.values())


def test_empty_set() -> None:
    masks = MaskSet.from_bool({})
    assert (masks.kept, masks.total, masks.sparsity) == (0, 0, 0.0)
    assert repr(masks) == "MaskSet: 0 parameters, kept 0 of 0, sparsity 0.0000"


def test_unpacked_masks_are_copies() -> None:
    masks = MaskSet.from_bool({"a": torch.tensor([True, False])})
    masks["a"].fill_(True)
    assert masks["a"].tolist() == [True, False]


def test_missing_name_suggests_the_nearest() -> None:
    masks = MaskSet.from_bool({"layer.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(KeyError, match=r"did you mean 'layer\.weight'"):
        masks["layer.wieght"]
    assert masks.get("nothing") is None


def test_from_bool_takes_zeros_and_ones_of_any_dtype() -> None:
    for dtype in (torch.uint8, torch.int64, torch.float32, torch.bfloat16):
        masks = MaskSet.from_bool({"a": torch.tensor([1, 0, 1], dtype=dtype)})
        assert masks["a"].tolist() == [True, False, True]


@pytest.mark.parametrize("values", [[1.0, 0.5], [1.0, math.nan], [-1.0, 0.0], [2.0, 0.0]])
def test_from_bool_refuses_other_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="'a' holds values other than 0 and 1"):
        MaskSet.from_bool({"a": torch.tensor(values)})


def test_from_bool_takes_wrappers_off() -> None:
    one = torch.ones(2, dtype=torch.bool)
    masks = MaskSet.from_bool(
        {"module._orig_mod.a.weight": one, "b.parametrizations.w.original": one}
    )
    assert list(masks) == ["a.weight", "b.w"]
    with pytest.raises(ValueError, match=r"both stand for 'a.weight'"):
        MaskSet.from_bool({"module.a.weight": one, "a.weight": one})


@pytest.mark.parametrize(
    ("packed", "shape", "message"),
    [
        (torch.zeros(2, dtype=torch.uint8), (3,), r"must be uint8 of shape \[1\] for 3 weights"),
        (torch.zeros(1, dtype=torch.int32), (3,), "must be uint8"),
        (torch.zeros(1, 1, dtype=torch.uint8), (3,), "must be uint8"),
        (torch.tensor([8], dtype=torch.uint8), (3,), "bits beyond its last weight"),
        (torch.zeros(0, dtype=torch.uint8), (1,), "must be uint8"),
    ],
)
def test_constructor_checks(packed: torch.Tensor, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskSet({"a": packed}, {"a": shape})


def test_constructor_names() -> None:
    bits = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no shape for 'a'"):
        MaskSet({"a": bits}, {"b": (3,)})
    with pytest.raises(ValueError, match="'__metadata__' is the header entry"):
        MaskSet({"__metadata__": bits}, {"__metadata__": (3,)})


def test_equality_is_by_value() -> None:
    one, two = random_masks(mlp()), random_masks(mlp())
    assert one == two
    assert one.digest == two.digest
    backwards = MaskSet(
        {n: one.packed(n) for n in reversed(list(one))}, one.shapes, {"method": "other"}
    )
    assert backwards == one
    assert backwards.digest == one.digest
    other = random_masks(mlp(), seed=1)
    assert other != one
    assert other.digest != one.digest
    flat = MaskSet(
        {n: one.packed(n) for n in one}, {n: (math.prod(s),) for n, s in one.shapes.items()}
    )
    assert flat != one
    assert flat.digest != one.digest
    assert one != "masks"
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_repr_is_a_short_table() -> None:
    masks = MaskSet.from_bool(
        {f"layer{i}.weight": torch.ones(2, 3, dtype=torch.bool) for i in range(30)},
        {"method": "dpai"},
    )
    lines = repr(masks).splitlines()
    assert lines[0] == "MaskSet: 30 parameters, kept 180 of 180, sparsity 0.0000, method dpai"
    assert lines[1].split() == ["layer0.weight", "[2,", "3]", "6", "of", "6"]
    assert "... 18 more ..." in lines[10]
    assert lines[-1].startswith("  layer29.weight")
    assert len(lines) == 14
    twelve = MaskSet({n: masks.packed(n) for n in list(masks)[:12]}, masks.shapes)
    assert len(repr(twelve).splitlines()) == 13
    assert "more" not in repr(twelve)


def test_copies() -> None:
    masks = random_masks(mlp())
    assert copy.deepcopy(masks) is masks
    assert pickle.loads(pickle.dumps(masks)) == masks


# --- apply and verify ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_apply_zeroes_exactly_the_pruned_weights(dtype: torch.dtype) -> None:
    model = zoo.create("resnet20", seed=0).to(dtype)
    masks = random_masks(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks.apply(model)
    for name, parameter in model.named_parameters():
        if name in masks:
            expected = torch.where(masks[name], before[name], torch.zeros((), dtype=dtype))
            assert torch.equal(parameter, expected)
        else:
            assert torch.equal(parameter, before[name])
    masks.verify(model)


def test_apply_kills_nan_and_infinity() -> None:
    model = mlp()
    masks = random_masks(model)
    name = "layers.1.weight"
    with torch.no_grad():
        model.get_parameter(name)[~masks[name]] = math.nan
        model.get_parameter("layers.3.weight").fill_(math.inf)
    masks.apply(model)
    assert torch.isfinite(model.get_parameter(name)).all()
    masks.verify(model)


def test_apply_keeps_the_graph_leaf_and_sees_strides() -> None:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.randn(6, 4).T)
    mask = torch.rand(4, 6) < 0.5
    parameter = layer.weight
    MaskSet.from_bool({"weight": mask}).apply(layer)
    assert layer.weight is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert torch.equal(parameter != 0, mask)


def test_apply_is_all_or_nothing() -> None:
    model = mlp()
    masks = random_masks(model)
    wrong = MaskSet.from_bool(
        {n: masks[n] for n in masks} | {"layers.9.weight": torch.ones(2, dtype=torch.bool)}
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskFormatError, match=r"belong to another model: .* 'layers\.9\.weight'"):
        wrong.apply(model)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_apply_to_another_model_names_the_shapes() -> None:
    masks = random_masks(mlp())
    other = zoo.create("mlp", sizes=(7, 6, 3))
    with pytest.raises(
        MaskFormatError, match=r"layers.1.weight has shape \[6, 7\], its mask \[5, 7\]"
    ):
        masks.apply(other)


def test_long_list_of_problems_is_cut() -> None:
    masks = random_masks(zoo.create("resnet20"))
    with pytest.raises(MaskFormatError, match=r"and 19 more$") as caught:
        masks.apply(mlp())
    assert "\n" not in str(caught.value)


def test_apply_on_meta() -> None:
    with torch.device("meta"):
        model = zoo.create("mlp", sizes=(7, 5, 3))
    masks = random_masks(mlp())
    with pytest.raises(ValueError, match=r"'layers.1.weight' is on the meta device"):
        masks.apply(model)
    assert masks.problems(model)[0] == "layers.1.weight is on the meta device and holds no values"


def test_verify_names_revived_weights() -> None:
    model = mlp()
    masks = random_masks(model)
    masks.apply(model)
    name = "layers.3.weight"
    with torch.no_grad():
        dead = (~masks[name]).nonzero()[:2]
        model.get_parameter(name)[dead[0, 0], dead[0, 1]] = 1e-30
        model.get_parameter(name)[dead[1, 0], dead[1, 1]] = math.nan
    assert masks.problems(model) == [
        "layers.3.weight has 2 pruned weights that are not 0; apply the masks"
    ]
    with pytest.raises(PaikernError, match=r"verify: layers.3.weight has 2 pruned"):
        masks.verify(model)


def test_verify_lists_everything_at_once() -> None:
    model = mlp()
    masks = MaskSet.from_bool(
        {
            "layers.1.weight": torch.zeros(5, 7, dtype=torch.bool),
            "layers.3.weight": torch.zeros(3, 4, dtype=torch.bool),
            "head.weight": torch.zeros(2, dtype=torch.bool),
        }
    )
    assert masks.problems(model) == [
        "the model has no parameter 'head.weight'",
        "layers.3.weight has shape [3, 5], its mask [3, 4]",
        "layers.1.weight has 35 pruned weights that are not 0; apply the masks",
    ]


def test_negative_zero_counts_as_pruned() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.0, 1.0]]))
    MaskSet.from_bool({"weight": torch.tensor([[False, True]])}).verify(layer)


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel]
)
def test_masks_fit_before_and_after_wrapping(wrap: object) -> None:
    model = mlp()
    masks = random_masks(model)
    wrapped = wrap(model)
    masks.apply(wrapped)
    masks.verify(wrapped)
    assert MaskSet.from_model(wrapped) == masks
    assert random_masks(wrapped) == masks


def test_masks_fit_a_parametrized_model() -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = mlp()
    masks = random_masks(model)
    parametrize.register_parametrization(model.layers[1], "weight", Double())
    masks.apply(model)
    masks.verify(model)
    assert torch.equal(model.layers[1].weight != 0, masks["layers.1.weight"])
    assert MaskSet.from_model(model) == masks


def test_any_alias_of_a_tied_weight_finds_it() -> None:
    model = zoo.create("gpt2", vocabulary=9, positions=16, layers=1, dim=8, heads=2)
    mask = torch.rand(9, 8) < 0.5
    for name in ("lm_head.weight", "transformer.wte.weight", "module.lm_head.weight"):
        fresh = copy.deepcopy(model)
        masks = MaskSet({name: MaskSet.from_bool({"a": mask}).packed("a")}, {name: (9, 8)})
        masks.apply(fresh)
        assert torch.equal(fresh.transformer.wte.weight != 0, mask)
        assert fresh.lm_head.weight is fresh.transformer.wte.weight


# --- from_model and torch.nn.utils.prune ---------------------------------------------------------


def test_from_model_reads_zeros() -> None:
    model = zoo.create("resnet20", seed=1)
    masks = random_masks(model)
    masks.apply(model)
    assert MaskSet.from_model(model) == masks
    assert list(MaskSet.from_model(model, ignore="fc")) == list(masks)[:-1]
    assert list(MaskSet.from_model(model, include="fc")) == ["fc.weight"]


def test_from_model_counts_nan_as_kept() -> None:
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[math.nan, 0.0]]))
    assert MaskSet.from_model(layer)["weight"].tolist() == [[True, False]]


def test_from_model_on_meta() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        MaskSet.from_model(nn.Linear(2, 2))


def test_to_and_from_torch_prune() -> None:
    model = mlp()
    dense = copy.deepcopy(model)
    masks = random_masks(model)
    masks.to_torch_prune(model)
    for name in masks:
        layer = model.get_submodule(name.rpartition(".")[0])
        assert torch_prune.is_pruned(layer)
        assert torch.equal(layer.weight_mask != 0, masks[name])
        assert torch.equal(layer.weight_orig, dense.get_parameter(name))
    assert MaskSet.from_model(model) == masks
    x = torch.randn(4, 7)
    masks.apply(dense)
    assert torch.equal(model(x), dense(x))
    masks.verify(model)


def test_masks_of_torch_prune_are_read_from_the_buffer() -> None:
    model = mlp()
    torch_prune.global_unstructured(
        [(model.layers[1], "weight"), (model.layers[3], "weight")],
        pruning_method=torch_prune.L1Unstructured,
        amount=20,
    )
    with torch.no_grad():  # a kept weight that happens to be 0 stays kept
        index = model.layers[1].weight_mask.nonzero()[0]
        model.layers[1].weight_orig[index[0], index[1]] = 0.0
    masks = MaskSet.from_model(model)
    assert masks.kept == masks.total - 20
    masks.apply(model)
    masks.verify(model)
    torch_prune.remove(model.layers[1], "weight")
    torch_prune.remove(model.layers[3], "weight")
    masks.verify(model)


def test_to_torch_prune_masks_attention_projections() -> None:
    model = nn.MultiheadAttention(4, 2)
    masks = random_masks(model)
    masks.to_torch_prune(model)
    assert torch.equal(model.in_proj_weight_mask != 0, masks["in_proj_weight"])


def test_to_torch_prune_masks_every_owner_of_a_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    masks = random_masks(model)
    masks.to_torch_prune(model)
    for layer in model:
        assert torch.equal(layer.weight_mask != 0, masks["0.weight"])
    assert model[0].weight_orig is model[1].weight_orig
    assert MaskSet.from_model(model) == masks


def test_to_torch_prune_refuses_parametrized() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    masks = random_masks(model)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"'0.weight' is parametrized"):
        masks.to_torch_prune(model)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("fc.weight", "fc.weight"),
        ("module.fc.weight", "fc.weight"),
        ("module.module.fc.weight", "fc.weight"),
        ("_orig_mod.module.fc.weight", "fc.weight"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.weight", "a.b.weight"),
        ("net.module.weight", "net.module.weight"),
        ("module", "module"),
        ("fc.parametrizations.weight.original", "fc.weight"),
        ("parametrizations.weight.original", "weight"),
        ("fc.weight_orig", "fc.weight"),
        ("_orig", "_orig"),
    ],
)
def test_strip_wrappers(wrapped: str, plain: str) -> None:
    assert strip_wrappers(wrapped) == plain


parts = st.sampled_from(
    ["module", "_orig_mod", "a", "weight", "parametrizations", "original", "b_orig", "0"]
)


@given(st.lists(parts, min_size=1, max_size=6))
def test_strip_wrappers_ignores_more_wrapping(path: list[str]) -> None:
    name = ".".join(path)
    assert strip_wrappers(f"module.{name}") == strip_wrappers(name)
    assert strip_wrappers(f"_orig_mod.{name}") == strip_wrappers(name)
