"""GPT-2 (Radford et al. 2019): pre-norm decoder, learned positions, tied output layer.

Parameter names are those of transformers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from paikern.zoo._common import InputSpec, check_positive


class Conv1D(nn.Module):
    """``x @ weight + bias`` with weight ``[in, out]``, as transformers stores GPT-2's layers."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.nf = out_features  # as transformers names it
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _dense(conv1d: bool, fan_in: int, fan_out: int) -> nn.Module:
    return Conv1D(fan_in, fan_out) if conv1d else nn.Linear(fan_in, fan_out)


class Attention(nn.Module):
    """Causal self-attention, query, key and value in one projection."""

    def __init__(self, dim: int, heads: int, conv1d: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = _dense(conv1d, dim, 3 * dim)
        self.c_proj = _dense(conv1d, dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        # three of [B, heads, T, dim / heads]
        q, k, v = (
            part.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(dim, dim=2)
        )
        x = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(x.transpose(1, 2).reshape(batch, length, dim))
        return out


class MLP(nn.Module):
    """Widen by 4, GELU (tanh form), narrow."""

    def __init__(self, dim: int, conv1d: bool) -> None:
        super().__init__()
        self.c_fc = _dense(conv1d, dim, 4 * dim)
        self.act = nn.GELU(approximate="tanh")
        self.c_proj = _dense(conv1d, 4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return out


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, conv1d: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, conv1d)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, conv1d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    """Token and position embeddings, the blocks, the last norm."""

    def __init__(
        self, vocabulary: int, positions: int, layers: int, dim: int, heads: int, conv1d: bool
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, dim)
        self.wpe = nn.Embedding(positions, dim)
        self.h = nn.ModuleList(Block(dim, heads, conv1d) for _ in range(layers))
        self.ln_f = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)  # [B, T, dim]
        for block in self.h:
            x = block(x)
        out: Tensor = self.ln_f(x)
        return out


class GPT2(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, vocabulary]``; ``lm_head`` shares ``wte``'s weight."""

    def __init__(
        self,
        *,
        vocabulary: int,
        positions: int,
        layers: int,
        dim: int,
        heads: int,
        conv1d: bool,
        tied: bool,
        sequence: int,
    ) -> None:
        super().__init__()
        check_positive("gpt2", vocabulary=vocabulary, layers=layers, heads=heads, sequence=sequence)
        if dim % heads:
            raise ValueError(f"gpt2: dim must be a multiple of heads ({heads}), got {dim}")
        if sequence > positions:
            raise ValueError(
                f"gpt2: sequence must be at most positions ({positions}), got {sequence}"
            )
        self.input_spec = InputSpec((sequence,), vocabulary)
        self.transformer = Transformer(vocabulary, positions, layers, dim, heads, conv1d)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self._init(layers)
        if tied:
            self.lm_head.weight = self.transformer.wte.weight

    def _init(self, layers: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
                # Projections back onto the residual stream are scaled down by its depth.
                scale = math.sqrt(2 * layers) if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight, std=0.02 / scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.transformer(tokens))
        return out


def gpt2(
    vocabulary: int = 50257,
    positions: int = 1024,
    layers: int = 12,
    dim: int = 768,
    heads: int = 12,
    conv1d: bool = False,
    tied: bool = True,
    sequence: int = 16,
) -> GPT2:
    """GPT-2 small by default: 84,934,656 prunable weights (the tied head is an embedding).

    ``sequence`` is the length of ``example_input``; ``conv1d`` stores the weights ``[in, out]``.
    """
    return GPT2(
        vocabulary=vocabulary,
        positions=positions,
        layers=layers,
        dim=dim,
        heads=heads,
        conv1d=conv1d,
        tied=tied,
        sequence=sequence,
    )
