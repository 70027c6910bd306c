"""Random networks on which maps are constant over space: padding is circular or absent.

No average pool has padding, and no convolution pads with zeros. Everything else that the rules
know is fair: strides, dilation, groups, branches, pools, norms, the way to the head.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F


class Branches(nn.Module):
    """`x` beside a convolution of it: added or concatenated."""

    def __init__(self, channels: int, join: str) -> None:
        super().__init__()
        self.conv = circular(channels, channels, 3)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).relu()
        return x + y if self.join == "add" else torch.cat([y, x], 1)


class Gate(nn.Module):
    """Squeeze and excitation: channels gated by their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, 2, 1, bias=False)
        self.excite = nn.Conv2d(2, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return x * y


class Shuffle(nn.Module):
    """Channel shuffle by views, as ShuffleNet does it; then a crop and a channel slice."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return y[:, : c - 1, : max(1, h - 1)]


class ChannelsLast(nn.Module):
    """A ConvNeXt block's middle: permute, LayerNorm, two linear layers, layer scale, back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.wide = nn.Linear(channels, 2 * channels, bias=False)
        self.narrow = nn.Linear(2 * channels, channels, bias=False)
        self.scale = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(F.gelu(self.wide(self.norm(x.permute(0, 2, 3, 1))))) * self.scale
        return x + y.permute(0, 3, 1, 2)


def circular(
    channels: int, out: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        channels, out, kernel, stride, dilation * (kernel // 2), dilation, groups,
        bias=False, padding_mode="circular",
    )  # fmt: skip


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer


@st.composite
def circular_nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A bias-free network and its input, 8x8 or 12x8."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    channels, height, width = 3, draw(st.sampled_from([8, 12])), 8
    x = torch.ones(1, channels, height, width)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([2, 4, 6]))
        groups = 2 if channels % 2 == 0 and draw(st.booleans()) else 1
        large = height >= 8
        stride = draw(st.sampled_from([1, 2])) if large else 1
        dilation = draw(st.sampled_from([1, 2])) if large else 1
        kernel = draw(st.sampled_from([1, 3]))
        layers.append(circular(channels, out, kernel, stride, dilation, groups))
        channels, height, width = out, height // stride, width // stride
        if draw(st.booleans()):
            layers.append(norm(channels))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.GELU(), nn.Dropout()])))
        part = draw(st.sampled_from(["", "add", "cat", "gate", "shuffle", "last", "valid"]))
        if part in ("add", "cat"):
            layers.append(Branches(channels, part))
            channels *= 2 if part == "cat" else 1
        elif part == "gate":
            layers.append(Gate(channels))
        elif part == "shuffle":
            layers.append(Shuffle())
            channels, height = channels - 1, max(1, height - 1)
        elif part == "last":
            layers.append(ChannelsLast(channels))
        elif part == "valid" and min(height, width) >= 3:
            layers.append(nn.Conv2d(channels, channels, 3, bias=False))
            height, width = height - 2, width - 2
        if min(height, width) >= 4:
            layers.append(
                draw(
                    st.sampled_from(
                        [nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)]
                    )
                )
            )
        with torch.no_grad():
            height, width = nn.Sequential(*layers)(x).shape[2:]
    layers.append(draw(st.sampled_from([nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(1)])))
    layers.append(nn.Flatten())
    with torch.no_grad():
        features = nn.Sequential(*layers).eval()(x).shape[1]
    layers.append(nn.Linear(features, 3, bias=False))
    return nn.Sequential(*layers).eval(), x
