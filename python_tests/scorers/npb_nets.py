"""Networks with every kind of weight that node-path balancing builds masks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from paikern import zoo


class Mixed(nn.Module):
    """Grouped, depthwise and transposed convolutions, a residual branch, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.depthwise = nn.Conv2d(24, 24, 5, padding=2, groups=24)
        self.skip = nn.Conv2d(12, 24, 1)
        self.up = nn.ConvTranspose2d(24, 8, 2, stride=2, groups=2)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.depthwise(torch.relu(self.grouped(x))) + self.skip(x)
        x = torch.relu(self.up(x)).mean((2, 3))
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))


def signals() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv1d(16, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 12, 6),
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Conv3d(6, 6, 2), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


SMALL_VIT = {"image_size": 32, "layers": 2, "dim": 32, "heads": 2, "num_classes": 7}
SMALL_GPT2 = {"vocabulary": 50, "positions": 32, "layers": 2, "dim": 32, "heads": 2}

NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mixed": (Mixed, torch.ones(1, 3, 8, 8)),
    "signals": (signals, torch.ones(1, 4, 32)),
    "volumes": (volumes, torch.ones(1, 2, 6, 6, 6)),
    "mlp": (lambda: zoo.create("lenet300"), torch.ones(1, 784)),
    "resnet20": (lambda: zoo.create("resnet20", image_size=16), torch.ones(1, 3, 16, 16)),
    "vit": (lambda: zoo.create("vit_b_16", **SMALL_VIT), torch.ones(1, 3, 32, 32)),
    "gpt2": (
        lambda: zoo.create("gpt2", tied=False, **SMALL_GPT2),
        torch.ones(1, 9, dtype=torch.int64),
    ),
    "gpt2 conv1d": (
        lambda: zoo.create("gpt2", tied=False, conv1d=True, **SMALL_GPT2),
        torch.ones(1, 9, dtype=torch.int64),
    ),
}
