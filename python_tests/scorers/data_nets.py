"""Small networks with something to learn from: an MLP, a residual network, three transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]

_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_DROPOUT_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Residual(nn.Module):
    """Norms, strides, groups, a 1x1 shortcut, a mean and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.short = nn.Conv2d(8, 8, 1, stride=2, bias=False)
        self.wide = nn.Conv2d(8, 10, (3, 1), padding=(2, 0), dilation=(2, 1))
        self.norm3 = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(self.norm2(self.body(x)) + self.short(x))
        x = torch.relu(self.norm3(self.wide(x)))
        return self.head(x.mean((2, 3)))


def prepared(model: nn.Module) -> nn.Module:
    """Statistics and offsets as after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model


def transformer(name: str, attention: str = "sdpa", dropout: bool = False) -> Built:
    """A few thousand parameters; the batch holds ids, a mask and labels."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (6, 7), generator=generator)
    mask = torch.ones_like(ids)
    if name == "bert":
        mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    if name == "bert":
        more = {} if dropout else _NO_DROPOUT
        config = transformers.BertConfig(**_TEXT, **more, num_labels=3)
        batch["labels"] = torch.randint(0, 3, (6,), generator=generator)
        kind = transformers.BertForSequenceClassification
    elif name == "gpt2":
        config = transformers.GPT2Config(
            **_GPT2, **_SPECIAL, **({} if dropout else _NO_DROPOUT_GPT2)
        )
        kind = transformers.GPT2LMHeadModel
    else:
        config = transformers.LlamaConfig(**_TEXT, **_SPECIAL, num_key_value_heads=1)
        kind = transformers.LlamaForCausalLM
    config._attn_implementation = attention
    model = kind(config)
    with torch.no_grad():  # transformers start near 0, where every method has little to tell apart
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model, batch


def network(name: str) -> Built:
    """A model and its data: "mlp", "residual", "bert", "gpt2" or "llama"."""
    if name in ("bert", "gpt2", "llama"):
        return transformer(name)
    torch.manual_seed(0)
    labels = torch.randint(0, 4, (20,))
    if name == "mlp":
        layers = [nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)]
        return nn.Sequential(*layers), (torch.randn(20, 6), labels)
    return prepared(Residual()), (torch.randn(20, 3, 9, 9), labels)


NETWORKS = ("mlp", "residual", "bert", "gpt2", "llama")


def double(batch: Any) -> Any:
    """The same data in float64."""
    if isinstance(batch, dict):
        return batch
    return tuple(t.double() if t.is_floating_point() else t for t in batch)


def state_of(model: nn.Module) -> dict[str, Any]:
    """What scoring must leave alone, besides the random state."""
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return {
        "tensors": tensors,
        "training": [m.training for m in model.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "patched": ["forward" in vars(m) for m in model.modules()],
        "momenta": [getattr(m, "momentum", None) for m in model.modules()],
        "random": torch.get_rng_state().clone(),
    }


def assert_same_state(model: nn.Module, before: dict[str, Any]) -> None:
    now = state_of(model)
    for key in ("training", "requires_grad", "hooks", "momenta", "patched"):
        assert now[key] == before[key], key
    assert torch.equal(now["random"], before["random"])
    for name, tensor in before["tensors"].items():
        assert torch.equal(now["tensors"][name], tensor), name
    for found, was in zip(now["gradients"], before["gradients"], strict=True):
        assert (found is None) == (was is None)
        assert found is None or torch.equal(found, was)
