"""Small networks of three kinds, and epochs of training for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 3


class Residual(nn.Module):
    """Two convolutions with batch norm around a shortcut, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv(x)))
        return self.head(x.mean((2, 3)))


class TinyBert(nn.Module):
    """A BERT of some thousand parameters that takes token ids and returns logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=CLASSES,
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.bert(input_ids=x).logits


def causal(name: str) -> nn.Module:
    """A language model of some thousand parameters: "gpt2" (Conv1D, tied output) or "llama"."""
    import transformers

    torch.manual_seed(0)
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        )
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 20), nn.ReLU(), nn.Linear(20, CLASSES))


NETS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "residual": Residual, "bert": TinyBert}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name]()


def samples(name: str, count: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "bert":
        x = torch.randint(1, 30, (count, 6), generator=generator)
        return x, x.sum(1) % CLASSES
    x = torch.randn(count, 2, 4, 4, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)


def train_epoch(
    model: nn.Module, optimizer: Any, name: str, *, size: int = 8, after_step: Any = None
) -> None:
    """One pass over the samples."""
    x, y = samples(name)
    model.train()
    for start in range(0, len(x), size):
        optimizer.zero_grad()
        functional.cross_entropy(model(x[start : start + size]), y[start : start + size]).backward()
        optimizer.step()
        if after_step is not None:
            after_step()


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
