"""Small networks with every way in which channels are coupled, and an input for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import paikern as pk


def conv(cin: int, cout: int, size: int = 3, groups: int = 1, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(cin, cout, size, padding=size // 2, groups=groups, bias=bias),
        nn.BatchNorm2d(cout),
        nn.ReLU(),
    )


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


class Residual(nn.Module):
    """Two branches added: the stem and both second convolutions keep the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.first = nn.Sequential(conv(8, 6), nn.Conv2d(6, 8, 3, padding=1))
        self.second = nn.Sequential(conv(8, 5), nn.Conv2d(5, 8, 1), nn.BatchNorm2d(8))
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.first(x))
        return self.head(torch.relu(x + self.second(x)))


class Dense(nn.Module):
    """DenseNet: every convolution reads all before it, through a norm over the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.head = head(18)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, layer(torch.relu(norm(x)))], 1)
        return self.head(x)


class Gated(nn.Module):
    """Squeeze and excite: the gate has the channels of what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(torch.tanh(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.head(x * gate.sigmoid())


class Attentive(nn.Module):
    """One map for all channels multiplies them: it stays, they are free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.map = conv(3, 8), nn.Conv2d(8, 1, 1)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x * self.map(x).sigmoid())


class Shuffled(nn.Module):
    """A channel shuffle: which channel follows which depends on how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next, self.head = conv(3, 8), conv(8, 6), head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(self.next(x))


class Transformer(nn.Module):
    """One pre-norm block: only the hidden layer of its MLP can become narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(5, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return self.out(x.mean(1))


def vgg() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.MaxPool2d(2), conv(8, 6), nn.Flatten(), nn.Linear(6 * 16, 7), nn.ReLU(),
        nn.Linear(7, 4),
    )  # fmt: skip


def mobile() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), conv(8, 8, groups=8), conv(8, 6, 1), nn.PReLU(6), conv(6, 6, groups=6), head(6)
    )


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 12, 1), conv(12, 8, groups=4), conv(8, 6, 1), head(6))


def upsampling() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ReLU(), nn.Upsample(scale_factor=2),
        conv(6, 5), head(5),
    )  # fmt: skip


class GroupedUp(nn.Module):
    """Transposed convolutions: one with two groups, one that filters each channel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.each = nn.ConvTranspose2d(6, 6, 3, padding=1, groups=6)
        self.last, self.out = conv(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(torch.relu(self.up(self.stem(x))))
        return self.out(self.last(x).amax((2, 3)))


def normed_over_channels() -> nn.Module:
    return nn.Sequential(
        conv(3, 8), nn.Conv2d(8, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 5), head(5)
    )


BUILDERS = {
    "mlp": lambda: pk.zoo.create("mlp", sizes=(5, 9, 8, 3)),
    "vgg": vgg,
    "residual": Residual,
    "dense": Dense,
    "mobile": mobile,
    "grouped": grouped,
    "gated": Gated,
    "attentive": Attentive,
    "upsampling": upsampling,
    "grouped_up": GroupedUp,
    "groupnorm": normed_over_channels,
    "shuffled": Shuffled,
    "transformer": Transformer,
    "resnet20": lambda: pk.zoo.create("resnet20", image_size=8),
}


# Layers that keep the same channels, in order of execution.
COUPLED = {
    "mlp": [["layers.1"], ["layers.3"]],
    "vgg": [["0.0"], ["2.0"], ["4"]],
    "residual": [["stem.0", "first.1", "second.1"], ["first.0.0"], ["second.0.0"]],
    "dense": [["stem"], ["convs.0"], ["convs.1"], ["convs.2"]],
    "mobile": [["0.0", "1.0"], ["2.0", "4.0"]],
    "grouped": [["0.0"], ["1.0"], ["2.0"]],
    "gated": [["stem.0", "excite"], ["squeeze"]],
    "attentive": [["stem.0"]],
    "upsampling": [["0.0"], ["1"], ["4.0"]],
    "grouped_up": [["stem.0"], ["up", "each"], ["last.0"]],
    "groupnorm": [["0.0"], ["4.0"]],
    "shuffled": [["next.0"]],
    "transformer": [["up"]],
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode with biases, norms and statistics that are not their defaults."""
    torch.manual_seed(0)
    net = BUILDERS[name]().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    sizes = {"mlp": (5,), "transformer": (6, 5)}
    return net, torch.randn(4, *sizes.get(name, (3, 8, 8)))
