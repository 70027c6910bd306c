"""Fully connected networks; LeNet-300-100 is the one of LeCun et al. 1998."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from paikern.zoo._common import InputSpec, check_positive, kaiming_init


class MLP(nn.Module):
    """Linear layers with ReLU between them; every sample is flattened first."""

    def __init__(self, sizes: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"mlp: sizes needs an input and an output, got {list(sizes)}")
        check_positive("mlp", **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
        self.input_spec = InputSpec((sizes[0],))
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # logits: no ReLU after the last layer
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)  # [B, sizes[-1]]
        return out


def mlp(sizes: Sequence[int] = (784, 256, 256, 10), bias: bool = True) -> MLP:
    """``sizes`` are input, hidden..., output."""
    return MLP(sizes, bias)


def lenet300(num_classes: int = 10, in_features: int = 784, bias: bool = True) -> MLP:
    """LeNet-300-100: 784-300-100-10, 266,200 weights."""
    return MLP((in_features, 300, 100, num_classes), bias)
