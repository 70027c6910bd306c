"""VGG with BatchNorm and one classifier layer (Simonyan & Zisserman 2015), for 32 px images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from paikern.zoo._common import InputSpec, check_positive, kaiming_init

_WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with 2x2 max-pools between them; mean pool; ``classifier``.

    The last stage ends in the mean pool, as in the networks that the pruning papers count.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        num_classes: int,
        image_size: int,
        in_channels: int,
        conv_bias: bool,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive("vgg", num_classes=num_classes, in_channels=in_channels)
        if not 0 < width < math.inf:
            raise ValueError(f"vgg: width must be a finite factor above 0, got {width}")
        if image_size < 16:
            raise ValueError(
                f"vgg: image_size must be at least 16 (four halvings), got {image_size}"
            )
        self.input_spec = InputSpec((in_channels, image_size, image_size))
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, (depth, full) in enumerate(zip(depths, _WIDTHS, strict=True)):
            if stage:
                layers.append(nn.MaxPool2d(2))
            out = max(1, round(width * full))
            for _ in range(depth):
                layers += [
                    nn.Conv2d(channels, out, 3, padding=1, bias=conv_bias),
                    nn.BatchNorm2d(out),
                    nn.ReLU(),
                ]
                channels = out
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)  # [B, 512 width, image_size // 16, image_size // 16]
        out: Tensor = self.classifier(self.avgpool(x).flatten(1))  # [B, num_classes]
        return out


def vgg16_bn(
    num_classes: int = 100,
    image_size: int = 32,
    in_channels: int = 3,
    conv_bias: bool = True,
    width: float = 1.0,
) -> VGG:
    """13 convolutions and the classifier: 14,761,664 prunable weights with 100 classes.

    ``width`` multiplies the channels of every convolution, rounded to a whole number of at least 1.
    """
    return VGG(
        (2, 2, 3, 3, 3),
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
        conv_bias=conv_bias,
        width=width,
    )


def vgg19_bn(
    num_classes: int = 100,
    image_size: int = 32,
    in_channels: int = 3,
    conv_bias: bool = True,
    width: float = 1.0,
) -> VGG:
    """16 convolutions and the classifier: 20,070,080 prunable weights with 100 classes.

    ``width`` multiplies the channels of every convolution, rounded to a whole number of at least 1.
    """
    return VGG(
        (2, 2, 4, 4, 4),
        num_classes=num_classes,
        image_size=image_size,
        in_channels=in_channels,
        conv_bias=conv_bias,
        width=width,
    )
