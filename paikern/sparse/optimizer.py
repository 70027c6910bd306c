"""An optimizer whose dense weights become packed values, or the other way round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paikern._attach import plain_optimizer


@dataclass(frozen=True)
class Exchange:
    """One parameter for another; ``convert`` turns a tensor of the old shape into the new one."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    convert: Callable[[Tensor], Tensor]
    suffix: str = ""
    """What the new parameter's name has behind the old one's; with "-" in front, what it loses."""


@dataclass
class Plan:
    """Groups and states as they will be; nothing of the optimizer has changed yet."""

    optimizer: Optimizer
    groups: list[dict[str, Any]] = field(default_factory=list)
    states: list[tuple[Tensor, Tensor, dict[str, Any]]] = field(default_factory=list)

    def carry_out(self) -> None:
        for group, changed in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update(changed)
        state: Any = self.optimizer.state
        for old, _, _ in self.states:
            state.pop(old, None)
        for _, new, found in self.states:
            state[new] = found


def plan(
    operation: str,
    optimizer: Any,
    exchanges: Sequence[Exchange],
    before: Sequence[nn.Parameter],
    after: Sequence[nn.Parameter],
) -> Plan:
    """What changes in an optimizer when the parameters of `exchanges` are exchanged.

    The groups keep their hyper-parameters. State of the old parameter's shape is converted, scalars
    go over as they are. A group in the order of `before` comes to be in the order of `after`, so
    that it fits an optimizer made from the parameters of the new model.

    Args:
        operation: who asks, for errors.
        optimizer: any torch optimizer but LBFGS and Muon, or a wrapper with it as `.optimizer`.
        exchanges: may name parameters that the optimizer does not hold.
        before, after: the parameters of the model, `model.parameters()`, before and after.

    Raises:
        TypeError, ValueError: no torch optimizer, LBFGS, Muon, one of other parameters, or state of
        another shape than its parameter, which cannot be converted.
    """
    plain = plain_optimizer(optimizer, operation)
    if isinstance(plain, torch.optim.LBFGS):
        raise ValueError(
            f"{operation}: LBFGS keeps one state for all parameters; make it after {operation}"
        )
    muon = getattr(torch.optim, "Muon", None)
    if muon is not None and isinstance(plain, muon):
        raise ValueError(
            f"{operation}: Muon needs parameters of two dimensions, packed values have one; use "
            "another optimizer for the packed weights"
        )
    held = {id(p) for group in plain.param_groups for p in group["params"]}
    if exchanges and not any(id(exchange.old) in held for exchange in exchanges):
        raise ValueError(
            f"{operation}: the optimizer holds none of the weights that change; make it from "
            "model.parameters() of this model"
        )
    result = Plan(plain)
    by_old = {id(exchange.old): exchange for exchange in exchanges}
    old_rank = {id(p): i for i, p in enumerate(before)}
    new_rank = {id(p): i for i, p in enumerate(after)}
    for group in plain.param_groups:
        result.groups.append(_group(group, by_old, old_rank, new_rank))
    for exchange in exchanges:
        if exchange.old in plain.state:
            found = {
                key: _converted(operation, exchange, key, value)
                for key, value in plain.state[exchange.old].items()
            }
            result.states.append((exchange.old, exchange.new, found))
    return result


def _group(
    group: dict[str, Any],
    by_old: dict[int, Exchange],
    old_rank: dict[int, int],
    new_rank: dict[int, int],
) -> dict[str, Any]:
    params: list[nn.Parameter] = group["params"]
    names: list[str] = group.get("param_names", [""] * len(params))
    pairs = []
    for parameter, name in zip(params, names, strict=True):
        exchange = by_old.get(id(parameter))
        pairs.append(
            (parameter, name) if exchange is None else (exchange.new, _renamed(name, exchange))
        )
    ranks = [old_rank.get(id(p), -1) for p in params]
    ordered = -1 not in ranks and ranks == sorted(ranks)
    if ordered and all(id(p) in new_rank for p, _ in pairs):
        pairs.sort(key=lambda pair: new_rank[id(pair[0])])
    new: dict[str, Any] = {"params": [parameter for parameter, _ in pairs]}
    if "param_names" in group:
        new["param_names"] = [name for _, name in pairs]
    return new


def _renamed(name: str, exchange: Exchange) -> str:
    if exchange.suffix.startswith("-"):
        return name.removesuffix(exchange.suffix[1:])
    return name + exchange.suffix


def _converted(operation: str, exchange: Exchange, key: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.shape == exchange.old.shape:
        return exchange.convert(value)
    if value.numel() == 1:
        return value
    raise ValueError(
        f"{operation}: the optimizer's '{key}' of '{exchange.name}' has shape "
        f"{tuple(value.shape)}, not that of the weight, and cannot be converted; make the "
        f"optimizer after {operation}"
    )


def gradient(exchange: Exchange) -> Tensor | None:
    """The gradient that the old parameter has, as one of the new."""
    grad = exchange.old.grad
    return None if grad is None else exchange.convert(grad)
