"""Scores of a path graph as plain tensors, for comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from paikern._names import slots
from paikern.pathgraph import Flow, PathGraph, Semantics, trace, weights


def state_of(model: nn.Module) -> dict[str, Tensor]:
    state = {slot.name: slot.tensor.detach() for slot in slots(model)}
    state.update({n: b.detach() for n, b in model.named_buffers()})
    return state


def scores_of(
    model: nn.Module,
    inputs: Any,
    *,
    power: int = 1,
    norm: str = "identity",
    offsets: bool = False,
    masks: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    graph: PathGraph | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """(log R, parameter -> |w|**p * dR/dV / R), float64, summed over the uses of a parameter."""
    graph = graph or trace(model, inputs)
    flow = Flow(graph, Semantics(power, norm, offsets), dtype=dtype)
    state = state_of(model)
    log_total = flow.forward(state, masks)
    mantissa, top = flow.total
    found: dict[str, Tensor] = {}

    def visit(v: Any) -> None:
        score = weights.score(v.step, v.x, v.g, state, masks or {}, power).double()
        score = score * 2.0 ** (v.exponent - top) / mantissa
        name, rows = v.step.parameter, v.step.rows
        whole = found.setdefault(name, torch.zeros(state[name].shape, dtype=torch.float64))
        part = whole[slice(None) if rows is None else slice(*rows)]
        part += score.reshape(part.shape)

    flow.backward(visit)
    return log_total, found


def autograd_scores(
    twin: nn.Module, inputs: Tensor, power: int = 1
) -> tuple[float, dict[str, Tensor]]:
    """The same from autograd on a network that is already linear, with |w|**power as weights."""
    twin = twin.double()
    with torch.no_grad():
        for p in twin.parameters():
            p.copy_(p.abs() ** power)
    total = twin(inputs.double()).sum()
    total.backward()
    return float(total.detach().log()), {
        n: (p.grad * p.detach() / total.detach())
        for n, p in twin.named_parameters()
        if p.grad is not None
    }
