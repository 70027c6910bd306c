"""Shared by the tests of packed models: small nets, masks, runs of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

import paikern as pk
from paikern.zoo.gpt2 import Conv1D

Optimizers = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


class Mlp(nn.Module):
    """Linear layers with and without bias, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.again = nn.Linear(40, 40, bias=False)
        self.last = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.first(x))
        x = x + functional.gelu(self.again(functional.gelu(self.again(x))))
        out: Tensor = self.last(x)
        return out


class Mixer(nn.Module):
    """Conv1D as transformers has it, a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(24, 48)
        self.down = Conv1D(48, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x + self.down(functional.gelu(self.up(x)))))
        return out


def net(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return {"mlp": Mlp, "mixer": Mixer}[kind]()


def random_masks(model: nn.Module, density: float = 0.2, seed: int = 7) -> pk.MaskSet:
    """Masks of every prunable weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes = pk.MaskSet.from_model(model).shapes
    return pk.MaskSet.from_bool(
        {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    )


def batches(count: int, seed: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(16, 24, generator=generator)
        yield x, (x[:, :5] + x[:, 5:10]).argmax(1)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 10, seed: int = 1
) -> list[float]:
    """The losses."""
    losses = []
    for x, y in batches(steps, seed):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    with pk.dense_keys():
        return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        assert error <= tolerance * value.abs().max().clamp_min(1.0), f"{name}: {error}"


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients, the optimizer's state, positions: what training the weights takes."""
    total = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            tensors = [parameter, parameter.grad, *optimizer.state[parameter].values()]
            total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    for module in model.modules():
        if isinstance(module, pk.PackedWeight):
            total += module.nbytes - module.nnz * module.values.element_size()
    return total
