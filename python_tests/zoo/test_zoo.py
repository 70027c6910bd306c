"""The zoo's shapes, counts, names and initial values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from paikern import zoo
from paikern.zoo._common import InputSpec
from paikern.zoo.gpt2 import Conv1D

# Weights of Linear, Conv and attention projections, a tied head counted once.
PRUNABLE = {
    "mlp": 784 * 256 + 256 * 256 + 256 * 10,
    "lenet300": 266_200,
    "resnet20": 270_896,
    "resnet18": 11_678_912,
    "resnet50": 25_502_912,
    "vgg16_bn": 14_761_664,
    "vgg19_bn": 20_070_080,
    "vit_b_16": 86_292_480,
    "gpt2": 84_934_656 + 50_257 * 768,
    "llama-tiny": 94_208,
    "llama-160m": 137_822_208,
    "llama-7b": 6_607_077_376,
}
SMALL = {
    "mlp": {"sizes": (7, 5, 3)},
    "lenet300": {},
    "resnet20": {"image_size": 8},
    "resnet18": {"image_size": 32, "num_classes": 7},
    "resnet50": {"image_size": 32, "num_classes": 7},
    "vgg16_bn": {"num_classes": 7},
    "vgg19_bn": {"num_classes": 7, "image_size": 64},
    "vit_b_16": {"image_size": 32, "layers": 2, "dim": 32, "heads": 2, "num_classes": 7},
    "gpt2": {"vocabulary": 50, "positions": 32, "layers": 2, "dim": 32, "heads": 2},
    "llama-tiny": {},
    "llama-160m": {"vocabulary": 50, "layers": 1},
}


def on_meta(name: str, **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        return zoo.create(name, **kwargs)


def prunable_count(model: nn.Module) -> int:
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, Conv1D))]
    weights += [m.in_proj_weight for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    return sum(w.numel() for w in weights)


def test_names_are_the_table_of_counts() -> None:
    assert zoo.names() == list(PRUNABLE)


@pytest.mark.parametrize("name", zoo.names())
def test_default_size_on_meta(name: str) -> None:
    model = on_meta(name)
    assert prunable_count(model) == PRUNABLE[name]
    x = zoo.example_input(model, batch=2)
    assert x.device.type == "meta"
    out = model(x)
    assert out.shape[0] == 2
    assert out.device.type == "meta"


@pytest.mark.parametrize("name", SMALL)
def test_forward_backward_finite(name: str) -> None:
    model = zoo.create(name, seed=3, **SMALL[name])
    out = model(zoo.example_input(model, batch=2))
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", SMALL)
def test_exports_with_the_same_result(name: str) -> None:
    model = zoo.create(name, seed=4, **SMALL[name]).eval()
    x = zoo.example_input(model)
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "gpt2", "llama-7b"])
def test_exports_on_meta(name: str) -> None:
    kwargs = {} if name == "resnet50" else {"layers": 1}
    model = on_meta(name, **kwargs).eval()
    program = torch.export.export(model, (zoo.example_input(model),), strict=False)
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.parametrize("name", ["resnet20", "vit_b_16", "llama-tiny"])
def test_seed_repeats_and_leaves_the_generator(name: str) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = zoo.create(name, seed=5, **SMALL[name]).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    second = zoo.create(name, seed=5, **SMALL[name]).state_dict()
    other = zoo.create(name, seed=6, **SMALL[name]).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_without_seed_the_global_generator_decides() -> None:
    torch.manual_seed(1)
    first = zoo.create("mlp", sizes=(4, 3)).state_dict()
    second = zoo.create("mlp", sizes=(4, 3)).state_dict()
    torch.manual_seed(1)
    again = zoo.create("mlp", sizes=(4, 3)).state_dict()
    assert torch.equal(first["layers.1.weight"], again["layers.1.weight"])
    assert not torch.equal(first["layers.1.weight"], second["layers.1.weight"])


@pytest.mark.parametrize("name", ["lenet300", "resnet20", "vgg16_bn"])
def test_kaiming_normal(name: str) -> None:
    model = zoo.create(name, seed=0)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight
            std = math.sqrt(2 / weight[0].numel())
            # 5 standard errors of a normal sample's standard deviation
            assert abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * weight.numel())
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_resnet20_layer_order() -> None:
    model = on_meta("resnet20")
    convs = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert convs[0] == "conv1"
    assert convs[7:10] == ["layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"]
    assert convs[-1] == "fc"
    assert len(convs) == 22


def test_resnet50_names_are_torchvisions() -> None:
    keys = on_meta("resnet50").state_dict()
    assert "layer1.0.downsample.0.weight" in keys
    assert "layer4.2.bn3.running_var" in keys
    assert keys["layer3.0.conv2.weight"].shape == (256, 256, 3, 3)
    assert len(keys) == 320  # torchvision's count


def test_gpt2_head_is_tied_unless_told() -> None:
    model = zoo.create("gpt2", **SMALL["gpt2"])
    assert model.lm_head.weight is model.transformer.wte.weight
    model = zoo.create("gpt2", tied=False, **SMALL["gpt2"])
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_gpt2_conv1d_is_the_transposed_linear() -> None:
    plain = zoo.create("gpt2", seed=0, **SMALL["gpt2"])
    stored = zoo.create("gpt2", conv1d=True, **SMALL["gpt2"])
    state = plain.state_dict()
    for key, module in stored.named_modules():
        if isinstance(module, Conv1D):
            state[f"{key}.weight"] = state[f"{key}.weight"].T
    stored.load_state_dict(state)
    tokens = zoo.example_input(plain)
    torch.testing.assert_close(stored(tokens), plain(tokens))


@pytest.mark.parametrize("name", ["gpt2", "llama-tiny"])
def test_decoders_are_causal(name: str) -> None:
    model = zoo.create(name, seed=0, **SMALL[name]).eval()
    tokens = zoo.example_input(model)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    out, other = model(tokens), model(changed)
    torch.testing.assert_close(out[:, :-1], other[:, :-1])
    assert not torch.allclose(out[:, -1], other[:, -1])


def test_llama_matches_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    ours = zoo.create("llama-tiny", seed=0).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = zoo.example_input(ours, batch=2)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-5)


def test_gpt2_matches_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_layer=2, n_embd=32, n_head=2, n_inner=None
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ours = zoo.create("gpt2", seed=0, conv1d=True, **SMALL["gpt2"]).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = zoo.example_input(ours, batch=2)
    torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-4, atol=1e-5)


def test_example_input_by_name_and_device() -> None:
    assert zoo.example_input("resnet20").shape == (1, 3, 32, 32)
    assert zoo.example_input("resnet50", device="meta").shape == (1, 3, 224, 224)
    tokens = zoo.example_input("llama-tiny", batch=3, seed=1)
    assert tokens.dtype == torch.int64
    assert 0 <= tokens.min() <= tokens.max() < 128
    assert torch.equal(tokens, zoo.example_input("llama-tiny", batch=3, seed=1))
    assert not torch.equal(tokens, zoo.example_input("llama-tiny", batch=3, seed=2))


def test_input_spec_is_a_value() -> None:
    assert zoo.create("mlp", sizes=(4, 2)).input_spec == InputSpec((4,))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("resnet21", "resnet20"), ("ResNet50", "resnet50"), ("llama7b", "llama-7b")],
)
def test_unknown_name_suggests_the_nearest(wrong: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"'{wrong}'; did you mean '{hint}'"):
        zoo.create(wrong)


def test_unknown_name_far_from_all_lists_them() -> None:
    with pytest.raises(ValueError, match="known: mlp, lenet300"):
        zoo.create("zzzzzz")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mlp", {"sizes": (4,)}, "sizes needs an input and an output"),
        ("mlp", {"sizes": (4, 0)}, r"sizes\[1\] must be at least 1, got 0"),
        ("resnet20", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("vgg16_bn", {"image_size": 8}, "image_size must be at least 16"),
        ("vgg16_bn", {"width": 0}, "width must be a finite factor above 0, got 0"),
        ("vgg19_bn", {"width": float("nan")}, "width must be a finite factor above 0, got nan"),
        ("vit_b_16", {"image_size": 30}, "multiple of patch"),
        ("vit_b_16", {"dim": 50}, "dim must be a multiple of heads"),
        ("gpt2", {"dim": 50}, "dim must be a multiple of heads"),
        ("gpt2", {"sequence": 2000}, r"sequence must be at most positions \(1024\)"),
        ("llama-tiny", {"dim": 60}, "dim must be a multiple of 2"),
        ("llama-tiny", {"kv_heads": 3}, "multiple of kv_heads"),
    ],
)
def test_bad_sizes(name: str, kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        on_meta(name, **kwargs)


def test_width_multiplies_the_channels() -> None:
    narrow = on_meta("vgg16_bn", width=0.25, num_classes=10, in_channels=1)
    widths = [m.out_channels for m in narrow.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [16] * 2 + [32] * 2 + [64] * 3 + [128] * 6
    assert narrow.classifier.in_features == 128
    assert [m.out_channels for m in on_meta("vgg19_bn", width=0.001).features[::3][:1]] == [1]
    x = torch.ones(2, 1, 16, 16, device="meta")
    assert narrow(x).shape == (2, 10)


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="depth"):
        zoo.create("resnet20", depth=3)


def test_example_input_of_a_stranger() -> None:
    with pytest.raises(TypeError, match="Linear is not a model of the zoo"):
        zoo.example_input(nn.Linear(2, 2))
