"""Small networks of every kind with samples and labels, for the methods that read data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """A strided stem, two batch norms, a residual add, a 1x1 convolution, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.stem(x)).relu()
        x = torch.tanh(x + self.norm2(self.body(x)))
        y: Tensor = self.head(self.wide(x).relu().mean((2, 3)))
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))


def bert(attention: str = "sdpa") -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=12, num_labels=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
        attn_implementation=attention,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def gpt2(attention: str = "sdpa") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2,
        initializer_range=0.3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        attn_implementation=attention,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _numbers(*shape: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 4, shape[:1], generator=generator)
        return torch.randn(shape, generator=generator), labels

    return draw


def _tokens(generator: torch.Generator, *, language: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(1, 31, (5, 8), generator=generator)
    seen = torch.ones_like(ids)
    seen[0, 6:] = 0
    labels = ids.masked_fill(seen == 0, -100) if language else torch.arange(5) % 4
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}


#: name -> (the model, a batch)
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Any]]] = {
    "mlp": (mlp, _numbers(11, 7)),
    "conv": (ConvNet, _numbers(9, 3, 8, 8)),
    "bert": (bert, _tokens),
    "gpt2": (gpt2, lambda generator: _tokens(generator, language=True)),
}


def make(name: str, seed: int = 3) -> nn.Module:
    """The network in training mode, its values drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETS[name][0]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # away from their initial values
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.train()


def batches(name: str, count: int = 2, seed: int = 5) -> list[Any]:
    """`count` batches of one size, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [NETS[name][1](generator) for _ in range(count)]


def double(batch: Any) -> Any:
    """The batch with its floating-point tensors in float64."""
    if isinstance(batch, dict):
        return {key: double(value) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(double(value) for value in batch)
    return batch.double() if isinstance(batch, Tensor) and batch.is_floating_point() else batch
