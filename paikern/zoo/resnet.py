"""Residual networks (He et al. 2016): ResNet-20 for 32 px images, ResNet-18 and -50 for ImageNet.

All use option B: a 1x1 strided convolution with BatchNorm where a shortcut changes shape.
Parameter names are torchvision's, so ImageNet checkpoints load. In module pre-order a block is
conv1, conv2, (conv3,) downsample.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from paikern.zoo._common import InputSpec, check_positive, kaiming_init


def _conv(cin: int, cout: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, size, stride, padding=size // 2, bias=False)


def _shortcut(cin: int, cout: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and cin == cout:
        return None
    return nn.Sequential(_conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(cin, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(cin, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        out: Tensor = self.relu(x + skip)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride, as in torchvision) and 1x1 convolution that widens by 4."""

    expansion = 4

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        cout = width * self.expansion
        self.conv1 = _conv(cin, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, cout, 1)
        self.bn3 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        out: Tensor = self.relu(x + skip)
        return out


class ResNet(nn.Module):
    """Stem, stages ``layer1``, ``layer2``, ... (stride 2 from the second on), mean pool, ``fc``."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        imagenet_stem: bool,
        num_classes: int,
        image_size: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        check_positive(
            "resnet", num_classes=num_classes, image_size=image_size, in_channels=in_channels
        )
        self.input_spec = InputSpec((in_channels, image_size, image_size))
        channels = widths[0]
        if imagenet_stem:
            self.conv1 = _conv(in_channels, channels, 7, 2)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = _conv(in_channels, channels, 3)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.stages = [f"layer{number}" for number in range(1, len(depths) + 1)]
        for name, depth, width in zip(self.stages, depths, widths, strict=True):
            blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if index == 0 and name != "layer1" else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        out: Tensor = self.fc(self.avgpool(x).flatten(1))  # [B, num_classes]
        return out


def resnet20(num_classes: int = 10, image_size: int = 32, in_channels: int = 3) -> ResNet:
    """Stem 16, stages 16/32/64 of 3 basic blocks: 270,896 prunable weights with 10 classes."""
    return ResNet(
        BasicBlock,
        (3, 3, 3),
        (16, 32, 64),
        imagenet_stem=False,
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
    )


def resnet18(num_classes: int = 1000, image_size: int = 224, in_channels: int = 3) -> ResNet:
    """ImageNet ResNet-18: 11,678,912 prunable weights with 1000 classes."""
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        (64, 128, 256, 512),
        imagenet_stem=True,
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
    )


def resnet50(num_classes: int = 1000, image_size: int = 224, in_channels: int = 3) -> ResNet:
    """ImageNet ResNet-50: 25,502,912 prunable weights with 1000 classes."""
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        (64, 128, 256, 512),
        imagenet_stem=True,
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
    )
