"""What the zoo's models share: the shape of their input and the initial values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InputSpec:
    """Shape of one sample; ``vocabulary`` is set where the samples are token numbers."""

    shape: tuple[int, ...]
    vocabulary: int | None = None

    def sample(self, batch: int, seed: int, device: torch.device) -> Tensor:
        """``[batch, *shape]``: standard normal float32, or int64 below ``vocabulary``."""
        size = (batch, *self.shape)
        generator = torch.Generator("cpu").manual_seed(seed)
        # The CPU is named because an enclosing torch.device("meta") would win over the default.
        if self.vocabulary is None:
            return torch.randn(size, generator=generator, device="cpu").to(device)
        return torch.randint(self.vocabulary, size, generator=generator, device="cpu").to(device)


def kaiming_init(model: nn.Module) -> None:
    """Weights N(0, 2 / fan_in), biases 0, BatchNorm gamma 1 and beta 0 (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def check_positive(model: str, **values: int) -> None:
    """Raise ``ValueError`` for the first value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {value}")
