"""Small networks of every topology that walks have to get right, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import paikern as pk


class Block(nn.Module):
    """Two convolutions beside an identity, or beside a 1x1 convolution where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, out, 3, padding=1)
        self.b = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.a(x).relu())
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6), Block(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return y


class Dense(nn.Module):
    """Every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = nn.Linear(15 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        y: Tensor = self.head(F.max_pool2d(x, 2).flatten(1))
        return y


class Grouped(nn.Module):
    """Groups, depthwise, a shuffle of channels, a kernel that is not square, a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, (3, 2), groups=2)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.ConvTranspose2d(8, 12, (2, 3), groups=4)
        self.d = nn.Conv2d(3, 4, (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x)).view(-1, 2, 4, 4, 5).transpose(1, 2).reshape(-1, 8, 4, 5)
        y: Tensor = self.d(F.pixel_shuffle(self.c(x.relu()), 2))
        return y


class Squeezed(nn.Module):
    """Channels weighted by a function of themselves, and a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3)
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.up(self.down(x.mean((2, 3))).relu()).sigmoid()
        x = F.avg_pool2d(x * gate[:, :, None, None], 2)
        y: Tensor = self.head(x.amax((2, 3)))
        return y[:, 1:]


class Attends(nn.Module):
    """Four heads of fused projections, keys grouped if asked, a class token in front if asked."""

    def __init__(self, grouped: bool = False, token: bool = False) -> None:
        super().__init__()
        self.heads, self.kv = 4, 2 if grouped else 4
        self.embed = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8)) if token else None
        self.qkv = nn.Linear(8, 8 + 2 * 2 * self.kv)
        self.out = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).split([8, 2 * self.kv, 2 * self.kv], -1)
        q = q.view(-1, x.shape[1], 4, 2).transpose(1, 2)
        k, v = (t.view(-1, x.shape[1], self.kv, 2).transpose(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv != 4)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.mlp(x)
        z: Tensor = self.head(x.mean(1) if self.token is None else x[:, 0])
        return z


def _chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 20, (3, 1)), nn.Flatten(), nn.Linear(20 * 8, 18), nn.Tanh(), nn.Linear(18, 4),
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 7))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (1, 3, 2, 2)),
    "chain": (_chain, (1, 2, 8, 8)),
    "residual": (Residual, (1, 2, 6, 6)),
    "dense": (Dense, (1, 3, 4, 4)),
    "grouped": (Grouped, (1, 4, 6, 6)),
    "squeezed": (Squeezed, (1, 3, 6, 6)),
    "attends": (Attends, (1, 3, 6)),
    "class_token": (lambda: Attends(token=True), (1, 3, 6)),
    "grouped_keys": (lambda: Attends(grouped=True), (1, 3, 6)),
    "gpt2": (
        lambda: pk.zoo.create(
            "gpt2", layers=2, heads=2, dim=16, vocabulary=30, positions=8, sequence=5
        ),
        (),
    ),
    "llama": (lambda: pk.zoo.create("llama-tiny"), ()),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETS[name][0]()
    shape = NETS[name][1]
    return net, torch.ones(shape) if shape else pk.zoo.example_input(net)
