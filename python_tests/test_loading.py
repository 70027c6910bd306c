"""Models from one line of text, and checkpoints."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import paikern as pk
from paikern.errors import PaikernError, PaikernWarning
from paikern.loading import (
    ModelLoadError,
    load_checkpoint,
    load_model,
    parse_shape,
)

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is absent")
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is absent"
)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working folder; returns its name."""
    name = "paikern_test_models"
    text = """
    import torch
    from torch import nn

    class Wide(nn.Linear):
        def __init__(self):
            super().__init__(8, 4)

    def plain():
        return nn.Linear(5, 2)

    def with_input():
        return nn.Linear(5, 2), torch.ones(1, 5)

    def needs_width(width):
        return nn.Linear(width, 2)

    def raises():
        raise RuntimeError("no luck\\nsecond line")

    def returns_text():
        return "model"

    ready = nn.Linear(2, 2)
    number = 3
    """
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield name
    sys.modules.pop(name, None)


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape"),
    [("1x3x32x32", (1, 3, 32, 32)), ("2,16", (2, 16)), (" 1X784 ", (1, 784)), ("7", (7,))],
)
def test_parse_shape(text: str, shape: tuple[int, ...]) -> None:
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "1x", "0x3", "-1x3", "1x3.5", "axb", "1 3", "1e3", "²x3"])
def test_parse_shape_refuses(text: str) -> None:
    with pytest.raises(ModelLoadError, match="joined by 'x'"):
        parse_shape(text)


# --- kinds of models -----------------------------------------------------------------------------


def test_zoo_model_is_seeded_and_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, x = load_model("lenet300", seed=3)
    again, _ = load_model("lenet300", seed=3)
    other, _ = load_model("lenet300", seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [next(iter(m.parameters())) for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert tuple(first(x).shape) == (1, 10)


def test_unknown_zoo_model_suggests_and_lists_the_other_forms() -> None:
    with pytest.raises(ModelLoadError, match=r"did you mean 'resnet20'.*timm:NAME"):
        load_model("resnet21")


def test_input_shape_replaces_the_models_own() -> None:
    _, x = load_model("resnet20", input_shape=(2, 3, 16, 16))
    assert tuple(x.shape) == (2, 3, 16, 16)
    _, tokens = load_model("llama-tiny", input_shape=(1, 5))
    assert tokens.dtype == torch.int64
    assert tuple(tokens.shape) == (1, 5)


def test_function_that_returns_a_model(code: str) -> None:
    model, x = load_model(f"{code}:plain")
    assert model.in_features == 5
    assert x is None
    _, x = load_model(f"{code}:plain", input_shape=(1, 5))
    assert tuple(x.shape) == (1, 5)


def test_function_that_returns_model_and_input(code: str) -> None:
    model, x = load_model(f"{code}:with_input")
    assert tuple(model(x).shape) == (1, 2)


def test_class_and_ready_module(code: str) -> None:
    assert load_model(f"{code}:Wide")[0].in_features == 8
    assert load_model(f"{code}:ready")[0].in_features == 2


def test_working_folder_is_on_the_path_only_while_importing(code: str, tmp_path: Path) -> None:
    load_model(f"{code}:plain")
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("plane", "has no 'plane'; did you mean 'plain'"),
        ("needs_width", "wants the argument 'width'"),
        ("raises", "RuntimeError: no luck$"),
        ("returns_text", "got str"),
        ("number", "is no function but a int"),
        ("", "nothing follows the colon"),
    ],
)
def test_function_errors_are_one_line(code: str, function: str, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(f"{code}:{function}")
    assert "\n" not in str(caught.value)


def test_missing_module_is_named() -> None:
    with pytest.raises(ModelLoadError, match="there is no module 'no_such_module_here'"):
        load_model("no_such_module_here.models:build")


def test_module_that_wants_an_absent_package_is_told_apart(code: str, tmp_path: Path) -> None:
    (tmp_path / "paikern_test_wants.py").write_text("import no_such_package_here\n")
    with pytest.raises(ModelLoadError, match="No module named 'no_such_package_here'"):
        load_model("paikern_test_wants:build")


@needs_timm
def test_timm_model_with_its_input_size() -> None:
    model, x = load_model("timm:test_resnet")
    assert tuple(x.shape[:2]) == (1, 3)
    masks = pk.prune(model, "dpai", sparsity=0.5, example_inputs=x, steps=2)
    assert masks.kept == masks.total - masks.total // 2


@needs_timm
def test_timm_name_is_suggested() -> None:
    with pytest.raises(ModelLoadError, match="timm has no model 'resnet1x'; did you mean 'timm:"):
        load_model("timm:resnet1x")


def test_absent_package_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("paikern.loading._repair_torchvision", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="timm is not installed; pip install timm"):
        load_model("timm:resnet18")


@needs_timm
@pytest.mark.slow
def test_timm_loads_in_a_bare_process() -> None:
    """Without the stub that the tests' own set-up brings."""
    script = (
        "from paikern.loading import load_model; print(load_model('timm:test_resnet')[1].shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]


@needs_transformers
def test_transformers_folder_with_a_config_only_says_so(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    with pytest.warns(PaikernWarning, match="holds a config only, no weights"):
        model, x = load_model(f"hf:{tmp_path}")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert x["input_ids"].max() < 50
    masks = pk.prune(model, "synflow", sparsity=0.5, example_inputs=x, rounds=2)
    assert masks.kept == masks.total - masks.total // 2


@needs_transformers
def test_transformers_folder_with_weights(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    made = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    made.save_pretrained(tmp_path)
    model, _ = load_model(f"hf:{tmp_path}")
    assert torch.equal(
        model.transformer.h[0].mlp.c_fc.weight, made.transformer.h[0].mlp.c_fc.weight
    )


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load_model(f"hf:{tmp_path}")


@needs_transformers
def test_folder_with_a_broken_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"hf:.*") as caught:
        load_model(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


# --- checkpoints ---------------------------------------------------------------------------------


def assert_same(model: nn.Module, source: nn.Module) -> None:
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["safetensors", "renamed safetensors", "torch"])
def test_checkpoint_is_recognised_by_content(tmp_path: Path, kind: str) -> None:
    source, model = net(), net()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.bin")
    if kind == "torch":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), path)
    load_checkpoint(model, path)
    assert_same(model, source)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_nesting_and_prefixes_are_taken_off(tmp_path: Path, key: str, prefix: str) -> None:
    source, model = net(), net()
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert_same(model, source)


def test_a_submodule_called_module_keeps_its_name(tmp_path: Path) -> None:
    source = nn.ModuleDict({"module": nn.Linear(2, 2)})
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert_same(model, source)


def test_missing_unexpected_and_wrong_shapes_are_all_named(tmp_path: Path) -> None:
    state = net().state_dict()
    del state["0.bias"]
    state["head.weight"] = torch.ones(2)
    state["2.weight"] = torch.ones(3, 4)
    torch.save(state, tmp_path / "w.pt")
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ModelLoadError,
        match=r"missing 0\.bias; unexpected head\.weight; 2\.weight has shape \[3, 4\], the "
        r"model's is \[2, 4\]",
    ):
        load_checkpoint(model, tmp_path / "w.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_many_names_are_cut(tmp_path: Path) -> None:
    torch.save({f"layer{i}": torch.ones(1) for i in range(50)}, tmp_path / "w.pt")
    with pytest.raises(ModelLoadError, match="and 45 more"):
        load_checkpoint(net(), tmp_path / "w.pt")


def test_tied_weight_stored_once_is_not_missing(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    source, model = Tied(), Tied()
    save_file({"embed.weight": source.embed.weight.detach()}, tmp_path / "w.safetensors")
    load_checkpoint(model, tmp_path / "w.safetensors")
    assert torch.equal(model.head.weight, source.embed.weight)


def test_checkpoint_without_batch_counters_fits(tmp_path: Path) -> None:
    state = {k: v for k, v in net().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    load_checkpoint(net(), tmp_path / "w.pt")


class Evil:
    """Unpickling this would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.path, "w")


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    torch.save({"w": Evil(str(tmp_path / "hacked"))}, tmp_path / "w.pt")
    with pytest.raises(ModelLoadError, match="holds more than tensors"):
        load_checkpoint(net(), tmp_path / "w.pt")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b"not a checkpoint at all", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files_are_one_line(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=name) as caught:
        load_checkpoint(net(), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_checkpoint(net(), path)


def test_what_is_no_state_dict_is_named(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "w.pt")
    with pytest.raises(ModelLoadError, match="holds no state dict but a list"):
        load_checkpoint(net(), tmp_path / "w.pt")
    with pytest.raises(ModelLoadError, match="there is no file"):
        load_checkpoint(net(), tmp_path / "absent.pt")


def test_errors_are_paikern_errors() -> None:
    assert issubclass(ModelLoadError, PaikernError)
    assert issubclass(ModelLoadError, ValueError)
