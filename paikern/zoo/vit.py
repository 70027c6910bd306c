"""Vision transformer ViT-B/16 (Dosovitskiy et al. 2021), pre-norm, with class token.

Parameter names are torchvision's.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from paikern.zoo._common import InputSpec, check_positive


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.self_attention(h, h, h, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Encoder(nn.Module):
    """Adds the positions, runs the blocks and the last norm."""

    def __init__(self, tokens: int, layers: int, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, dim))
        self.layers = nn.Sequential(
            OrderedDict(
                (f"encoder_layer_{i}", EncoderBlock(dim, heads, mlp_dim)) for i in range(layers)
            )
        )
        self.ln = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.ln(self.layers(x + self.pos_embedding))
        return out


class VisionTransformer(nn.Module):
    """Patches to tokens, encoder, classifier on the class token."""

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        in_channels: int,
        patch: int,
        layers: int,
        dim: int,
        heads: int,
        mlp_dim: int,
    ) -> None:
        super().__init__()
        check_positive("vit", num_classes=num_classes, layers=layers, heads=heads, patch=patch)
        if image_size % patch:
            raise ValueError(
                f"vit: image_size must be a multiple of patch ({patch}), got {image_size}"
            )
        if dim % heads:
            raise ValueError(f"vit: dim must be a multiple of heads ({heads}), got {dim}")
        self.input_spec = InputSpec((in_channels, image_size, image_size))
        self.conv_proj = nn.Conv2d(in_channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.encoder = Encoder((image_size // patch) ** 2 + 1, layers, dim, heads, mlp_dim)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(dim, num_classes)))
        self._init()

    def _init(self) -> None:
        fan_in = self.conv_proj.weight[0].numel()
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / fan_in))
        nn.init.zeros_(self.class_token)
        nn.init.normal_(self.encoder.pos_embedding, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_proj(x).flatten(2).transpose(1, 2)  # [B, patches, dim]
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        out: Tensor = self.heads(self.encoder(x)[:, 0])  # [B, num_classes]
        return out


def vit_b_16(
    num_classes: int = 1000,
    image_size: int = 224,
    in_channels: int = 3,
    patch: int = 16,
    layers: int = 12,
    dim: int = 768,
    heads: int = 12,
    mlp_dim: int | None = None,
) -> VisionTransformer:
    """ViT-B/16: 86,292,480 prunable weights with 1000 classes, ``mlp_dim`` defaults to 4 * dim."""
    return VisionTransformer(
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
        patch=patch,
        layers=layers,
        dim=dim,
        heads=heads,
        mlp_dim=4 * dim if mlp_dim is None else mlp_dim,
    )
