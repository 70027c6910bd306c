"""The same script with torch's pruning and with ours, on equal modules and seeds."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from paikern import torch_prune as prune

M = TypeVar("M", bound=nn.Module)


def both(make: Callable[[], M], script: Callable[[ModuleType, M], Any]) -> tuple[M, M]:
    """Run `script(library, module)` with both libraries; return both modules.

    What the scripts return must be equal as well: numbers, tensors, or lists of them.
    """
    modules, results = [], []
    for library in (torch_prune, prune):
        torch.manual_seed(5)
        module = make()
        results.append(script(library, module))
        modules.append(module)
    assert equal(*results), results
    return modules[0], modules[1]


def equal(left: Any, right: Any) -> bool:
    """Whether the values are equal, bit for bit but for the sign of zeros."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def assert_same(torchs: nn.Module, ours: nn.Module) -> None:
    """Equal state, order of names, effective tensors, and kinds of hooks."""
    left, right = torchs.state_dict(), ours.state_dict()
    assert list(left) == list(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name
    for members in ("named_parameters", "named_buffers"):
        names = [[n for n, _ in getattr(m, members)()] for m in (torchs, ours)]
        assert names[0] == names[1]
    for a, b in zip(torchs.modules(), ours.modules(), strict=True):
        assert type(a) is type(b)
        assert hooks(a) == hooks(b)
        for name in [n for n, _ in hooks(a)]:
            assert torch.equal(getattr(a, name), getattr(b, name)), name
            ours_grad = getattr(b, f"{name}_orig").grad
            theirs_grad = getattr(a, f"{name}_orig").grad
            assert (ours_grad is None) == (theirs_grad is None)
            assert ours_grad is None or torch.equal(ours_grad, theirs_grad), name


def hooks(module: nn.Module) -> list[tuple[str, list[str]]]:
    """Parameter and classes of each pruning hook, in order."""
    return [
        (
            hook._tensor_name,
            [type(m).__name__ for m in getattr(hook, "_pruning_methods", [hook])],
        )
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, torch_prune.BasePruningMethod)
    ]
