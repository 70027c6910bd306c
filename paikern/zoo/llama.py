"""Llama (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameter names are those of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paikern.zoo._common import InputSpec, check_positive


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    return nn.Linear(fan_in, fan_out, bias=False)


def _rotary_tables(length: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin ``[T, head_dim]`` (Su et al. 2021).

    Made in every forward, so there is no buffer to lose on ``to_empty``.
    """
    steps = torch.arange(0, head_dim, 2, device=like.device, dtype=torch.float32)
    inverse = 10000.0 ** (-steps / head_dim)  # [head_dim / 2]
    positions = torch.arange(length, device=like.device, dtype=torch.float32)
    angles = torch.cat([positions[:, None] * inverse] * 2, dim=-1)  # [T, head_dim]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal attention; ``heads / kv_heads`` query heads share one key and value head."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj = _linear(dim, dim)
        self.k_proj = _linear(dim, kv_heads * self.head_dim)
        self.v_proj = _linear(dim, kv_heads * self.head_dim)
        self.o_proj = _linear(dim, dim)

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], count, self.head_dim).transpose(1, 2)

    def _share(self, x: Tensor) -> Tensor:
        """``[B, kv_heads, T, d]`` to ``[B, heads, T, d]``, each head repeated in place."""
        batch, _, length, dim = x.shape
        repeats = self.heads // self.kv_heads
        x = x[:, :, None].expand(batch, self.kv_heads, repeats, length, dim)
        return x.reshape(batch, self.heads, length, dim)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = _rotary_tables(x.shape[1], self.head_dim, x)
        q = _rotate(self._heads(self.q_proj(x), self.heads), cos, sin)
        k = self._share(_rotate(self._heads(self.k_proj(x), self.kv_heads), cos, sin))
        v = self._share(self._heads(self.v_proj(x), self.kv_heads))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(x.shape))
        return out


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = _linear(dim, hidden)
        self.up_proj = _linear(dim, hidden)
        self.down_proj = _linear(hidden, dim)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """x + self_attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(dim, heads, kv_heads)
        self.mlp = MLP(dim, hidden)
        self.input_layernorm = nn.RMSNorm(dim, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Token embedding, the layers, the last norm."""

    def __init__(
        self, vocabulary: int, layers: int, dim: int, heads: int, kv_heads: int, hidden: int
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)  # [B, T, dim]
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """Tokens ``[B, T]`` to logits ``[B, T, vocabulary]``."""

    def __init__(
        self,
        *,
        vocabulary: int,
        layers: int,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        tied: bool = False,
        sequence: int = 16,
    ) -> None:
        super().__init__()
        check_positive("llama", vocabulary=vocabulary, layers=layers, heads=heads, hidden=hidden)
        check_positive("llama", kv_heads=kv_heads, sequence=sequence)
        if dim % (2 * heads):
            raise ValueError(f"llama: dim must be a multiple of 2 * heads ({2 * heads}), got {dim}")
        if heads % kv_heads:
            raise ValueError(
                f"llama: heads must be a multiple of kv_heads ({kv_heads}), got {heads}"
            )
        self.input_spec = InputSpec((sequence,), vocabulary)
        self.model = Decoder(vocabulary, layers, dim, heads, kv_heads, hidden)
        self.lm_head = _linear(dim, vocabulary)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.model(tokens))
        return out


def llama_tiny(**kwargs: Any) -> Llama:
    """2 layers of 64 with 4 query and 2 key-value heads, for tests."""
    sizes = {"vocabulary": 128, "layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "hidden": 160}
    return Llama(**(sizes | kwargs))


def llama_160m(**kwargs: Any) -> Llama:
    """12 layers of 768, 162 million parameters."""
    sizes = {
        "vocabulary": 32000,
        "layers": 12,
        "dim": 768,
        "heads": 12,
        "kv_heads": 12,
        "hidden": 3072,
    }
    return Llama(**(sizes | kwargs))


def llama_7b(**kwargs: Any) -> Llama:
    """32 layers of 4096, 6.7 billion parameters; under ``torch.device("meta")`` only shapes."""
    sizes = {
        "vocabulary": 32000,
        "layers": 32,
        "dim": 4096,
        "heads": 32,
        "kv_heads": 32,
        "hidden": 11008,
    }
    return Llama(**(sizes | kwargs))
