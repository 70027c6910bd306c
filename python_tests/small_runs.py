"""A small network, a short run of every method, and a guard that finds any change of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import paikern as pk

X = torch.ones(1, 1, 8, 8)
METHODS: dict[str, dict[str, Any]] = {
    "random": {},
    "magnitude": {},
    "synflow": {"rounds": 4, "example_inputs": X},
    "synflow_l2": {"rounds": 2, "example_inputs": X},
    "logsynflow": {"rounds": 2, "example_inputs": X},
    "dpai": {"steps": 3, "example_inputs": X},
}


class Net(nn.Module):
    """Convolutions, a norm with statistics, dropout, a residual add, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.drop(x + self.body(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


TOTAL = 72 + 576 + 40


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Net()


def prune(model: nn.Module, method: str, **options: Any) -> pk.MaskSet:
    options = {"sparsity": 0.5, "progress": False, **METHODS[method], **options}
    return pk.prune(model, method, **options)


class Untouched:
    """Everything about a model, and the generator, that an operation must leave alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        self.handle = model.register_forward_hook(lambda *_: None)
        model.train()
        self.before = self.look()

    def look(self) -> list[Any]:
        model = self.model
        values: list[Any] = [torch.get_rng_state()]
        for name, tensor in model.state_dict(keep_vars=True).items():
            values += [
                name, id(tensor), tensor.data_ptr(), tensor.detach().clone(), tensor._version,
                tensor.requires_grad, None if tensor.grad is None else tensor.grad.clone(),
            ]  # fmt: skip
        for name, module in model.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            values += [name, module.training, [list(h) for h in hooks], sorted(vars(module))]
        return values

    def check(self) -> None:
        after = self.look()
        assert len(after) == len(self.before)
        for a, b in zip(self.before, after, strict=True):
            if isinstance(a, Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                assert a == b
