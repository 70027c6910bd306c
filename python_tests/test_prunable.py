"""Which weights are pruned, under which names."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from paikern import zoo
from paikern.errors import PaikernWarning
from paikern.prunable import Prunable, prunable_parameters, unwrap
from paikern.zoo.gpt2 import Conv1D


class Everything(nn.Module):
    """One layer of each kind, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.embed = nn.Embedding(5, 4)
        self.c1 = nn.Conv1d(2, 4, 3)
        self.c2 = nn.Conv2d(2, 4, 3, groups=2)
        self.c3 = nn.Conv3d(2, 4, 3)
        self.t1 = nn.ConvTranspose1d(2, 4, 3)
        self.t2 = nn.ConvTranspose2d(2, 4, 3)
        self.t3 = nn.ConvTranspose3d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.hf = Conv1D(4, 6)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.rnn = nn.LSTM(4, 3)
        self.head = nn.Linear(4, 2)


def names(model: nn.Module, **filters: object) -> list[str]:
    return list(prunable_parameters(model, **filters))


ALL = [
    "c1.weight",
    "c2.weight",
    "c3.weight",
    "t1.weight",
    "t2.weight",
    "t3.weight",
    "hf.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "cross.q_proj_weight",
    "cross.k_proj_weight",
    "cross.v_proj_weight",
    "cross.out_proj.weight",
    "head.weight",
]


def test_every_kind_in_module_order() -> None:
    found = prunable_parameters(Everything())
    assert list(found) == ALL
    assert [p.kind for p in found.values()] == [
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "hf_conv1d",
        "attention",
        "linear",
        "attention",
        "attention",
        "attention",
        "linear",
        "linear",
    ]
    assert found["c2.weight"] == Prunable(
        "c2.weight", (4, 1, 3, 3), "conv2d", "c2", "c2.weight", groups=2
    )
    assert found["attention.in_proj_weight"].shape == (12, 4)


@pytest.mark.parametrize(
    ("name", "layers", "total"),
    [
        ("lenet300", 3, 266_200),
        ("resnet20", 22, 270_896),
        ("resnet50", 54, 25_502_912),
        ("vgg19_bn", 17, 20_070_080),
        ("vit_b_16", 50, 86_292_480),
        ("llama-7b", 225, 6_607_077_376),
    ],
)
def test_zoo_counts_on_meta(name: str, layers: int, total: int) -> None:
    with torch.device("meta"):
        model = zoo.create(name)
    found = prunable_parameters(model)
    assert len(found) == layers
    assert sum(torch.Size(p.shape).numel() for p in found.values()) == total


def test_root_layer_has_no_prefix() -> None:
    assert names(nn.Linear(2, 3)) == ["weight"]


# --- sharing -------------------------------------------------------------------------------------


def test_head_tied_to_embedding_is_left_out_with_a_note() -> None:
    model = zoo.create("gpt2", vocabulary=9, positions=16, layers=1, dim=8, heads=2)
    with pytest.warns(PaikernWarning, match=r"lm_head.weight is left out: the embedding 'transf"):
        found = names(model)
    assert found == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]


def test_ignoring_the_tied_head_gives_no_note() -> None:
    model = zoo.create("gpt2", vocabulary=9, positions=16, layers=1, dim=8, heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(names(model, ignore="lm_head")) == 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weight_counts_once_under_its_first_name(device: str) -> None:
    with torch.device(device):
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert names(model) == ["0.weight", "3.weight"]


def test_storages_shared_by_two_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert model[1].weight is not model[0].weight
    assert names(model) == ["0.weight"]


def test_disjoint_views_of_one_buffer_are_two_weights() -> None:
    buffer = torch.zeros(2, 3, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for layer, part in zip(model, buffer, strict=True):
        layer.weight = nn.Parameter(part)
    assert names(model) == ["0.weight", "1.weight"]


def test_shared_module_counts_once() -> None:
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.ReLU(), layer)) == ["0.weight"]


# --- filters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ("head", ALL[:-1]),
        (["head.weight"], ALL[:-1]),
        (["attention"], [n for n in ALL if not n.startswith("attention")]),
        (["re:c[123]"], ALL[3:]),
        (["re:.*out_proj"], [n for n in ALL if "out_proj" not in n]),
        (["re:nothing"], ALL),
        (nn.MultiheadAttention, [n for n in ALL if n[:2] not in {"at", "cr"}]),
        ([nn.Conv1d, nn.Conv2d, Conv1D], [n for n in ALL if n[:2] not in {"c1", "c2", "hf"}]),
        (["embed", "norm"], ALL),
        ((), ALL),
        (None, ALL),
    ],
)
def test_ignore(ignore: object, left: list[str]) -> None:
    assert names(Everything(), ignore=ignore) == left


def test_ignore_a_module_itself() -> None:
    model = Everything()
    assert names(model, ignore=model.cross) == [n for n in ALL if not n.startswith("cross")]
    assert names(model, include=[model.head, "c1"]) == ["c1.weight", "head.weight"]


@pytest.mark.parametrize(
    ("include", "taken"),
    [
        ("head", ["head.weight"]),
        ([nn.Linear], [n for n in ALL if n.endswith("out_proj.weight")] + ["head.weight"]),
        (["re:t", "hf.weight"], ["t1.weight", "t2.weight", "t3.weight", "hf.weight"]),
        (["rnn.weight_ih_l0", "head"], ["rnn.weight_ih_l0", "head.weight"]),
    ],
)
def test_include(include: object, taken: list[str]) -> None:
    assert names(Everything(), include=include) == taken


def test_ignore_wins_over_include() -> None:
    assert names(Everything(), include=["attention"], ignore=["re:.*out_proj"]) == [
        "attention.in_proj_weight"
    ]


def test_opted_in_parameter_has_kind_other() -> None:
    found = prunable_parameters(Everything(), include=["embed.weight"])
    assert found["embed.weight"].kind == "other"


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"ignore": ["haed"]}, "ignore: 'haed' is no parameter or module .* did you mean 'head'"),
        ({"include": "xxxxxxxx"}, "include: 'xxxxxxxx' is no parameter or module of the model$"),
        ({"ignore": "re:("}, r"ignore: 're:\(' is no regular expression"),
        ({"ignore": nn.Module}, r"ignore=\[Module\] leaves none of the 14 prunable weights"),
        ({"include": ["norm"]}, r"include=\[norm\] \(ignore=\[\]\) leaves none of the 14"),
        ({"include": ["head.bias"]}, "include: 'head.bias' has 1 dimension"),
    ],
)
def test_bad_filters(filters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prunable_parameters(Everything(), **filters)


@pytest.mark.parametrize("item", [3, int, torch.zeros(2)])
def test_filter_of_the_wrong_type(item: object) -> None:
    with pytest.raises(TypeError, match="ignore: give names"):
        prunable_parameters(Everything(), ignore=[item])


# --- models without plain weights ----------------------------------------------------------------


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="model: Sequential has no Linear, Conv or attention"):
        prunable_parameters(nn.Sequential(nn.LayerNorm(3), nn.Embedding(3, 3)))


def test_only_a_tied_head() -> None:
    model = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"nothing to prune; 1\.weight is left out: the embedding"):
        prunable_parameters(model)


def test_lazy_layer() -> None:
    with pytest.raises(ValueError, match="layer '1' is a LazyLinear without a shape yet"):
        prunable_parameters(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_integer_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.warns(PaikernWarning, match=r"1.weight is left out: torch.int8"):
        assert names(model) == ["0.weight"]


def test_weight_norm_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.warns(PaikernWarning, match="1 is left out: its weight is made from other"):
        assert names(model) == ["0.weight"]


# --- wrapped models ------------------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Holder(nn.Module):
    """A model whose own child happens to be called ``module``."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)


def test_parametrized_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parametrize.register_parametrization(model[1], "weight", Double())
    found = prunable_parameters(model)
    assert list(found) == ["0.weight", "1.weight"]
    assert found["1.weight"].source == "1.parametrizations.weight.original"
    assert found["1.weight"].source in dict(model.named_parameters())
    assert found["1.weight"].module_name == "1"


def test_torch_pruned_weight() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert prunable_parameters(model)["0.weight"].source == "0.weight_orig"


@pytest.mark.parametrize(
    "wrap", [torch.compile, nn.DataParallel, torch.optim.swa_utils.AveragedModel]
)
def test_wrapped_model_keeps_its_names(wrap: object) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    wrapped = wrap(model)
    found = prunable_parameters(wrapped)
    assert list(found) == ["0.weight", "1.weight"]
    assert all(p.source in dict(wrapped.named_parameters()) for p in found.values())
    assert names(wrapped, ignore="1") == ["0.weight"]
    inner = unwrap(wrapped)
    assert type(inner) is nn.Sequential
    assert list(dict(inner.named_parameters())) == list(dict(model.named_parameters()))


def test_wrapped_twice_and_inside() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.DataParallel(nn.Linear(2, 2)))
    assert names(torch.compile(nn.DataParallel(model))) == ["0.weight", "1.weight"]


def test_a_child_called_module_is_no_wrapper() -> None:
    assert names(Holder()) == ["module.weight"]
    assert unwrap(Holder())._get_name() == "Holder"
    assert names(nn.DataParallel(Holder())) == ["module.weight"]
