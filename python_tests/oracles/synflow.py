"""The SynFlow family in float64, one autograd pass and one full sort a round.

    R from V_l = M_l * |W_l|**p_net,   S_l = |W_l|**p_score * dR/dV_l      or, LogSynFlow,
    S_l = |W_l| * log(1 + dR/d|W_l|)

(p_net, p_score): SynFlow (1, 1), SynFlow-L2 a (2, 2), b (1, 2), c (2, 1).

Variant "paper": norms are positive scales, biases dropped. Variant "published": the model itself in
eval mode, every tensor of its state dict replaced by |t|**p_net.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from python_tests.oracles.paths import first_tensor, path_oracle, prunable

Tensors = dict[str, Tensor]


@dataclass
class SynFlowRun:
    """Masks after the last round; log R and kept count of every round; scores of the last round."""

    masks: Tensors
    log_totals: list[float]
    kept: list[int]
    scores: Tensors


def flow_scores(
    model: nn.Module,
    example_input: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    *,
    p_net: int = 1,
    p_score: int = 1,
    log_score: bool = False,
    variant: str = "paper",
    norm: str = "scale",
    keep_bias: bool = False,
) -> tuple[float, Tensors]:
    """Return log R and the scores by parameter name, float64, 0 where the mask is 0."""
    if variant == "paper":
        flow = path_oracle(model, example_input, masks, p_net=p_net, norm=norm, keep_bias=keep_bias)
        log_total = flow.log_total
        gradients = {name: layer.gradient for name, layer in flow.layers.items()}
    elif variant == "published":
        log_total, gradients = _published_gradients(model, example_input, masks, p_net)
    else:
        raise ValueError(f"variant must be 'paper' or 'published', got {variant!r}")
    scores = {}
    for name, (_, parameter) in prunable(model).items():
        magnitude = parameter.detach().double().abs()
        gradient = gradients[name]
        score = magnitude * gradient.log1p() if log_score else magnitude**p_score * gradient
        mask = None if masks is None else masks.get(name)
        scores[name] = score if mask is None else score * mask.bool()
    return log_total, scores


def _published_gradients(
    model: nn.Module, example_input: Tensor, masks: Mapping[str, Tensor] | None, p_net: int
) -> tuple[float, Tensors]:
    work = copy.deepcopy(model).double().eval()
    layers = prunable(work)
    with torch.no_grad():
        for tensor in work.state_dict().values():
            tensor.copy_(tensor.abs() ** p_net)
        for name, (_, parameter) in layers.items():
            if masks is not None and name in masks:
                parameter.mul_(masks[name].bool())
    total = first_tensor(work(torch.ones_like(example_input[:1], dtype=torch.float64))).sum()
    parameters = [parameter for _, parameter in layers.values()]
    gradients = torch.autograd.grad(total, parameters)
    value = total.item()
    log_total = math.log(value) if value > 0 else -math.inf
    return log_total, dict(zip(layers, gradients, strict=True))


def keep_exactly(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], keep: int) -> Tensors:
    """Keep exactly `keep`: alive first, then higher score, then lower global index."""
    flat = np.concatenate([score.detach().numpy().ravel() for score in scores.values()])
    live = np.concatenate([alive[name].numpy().ravel() for name in scores])
    # lexsort: the last key counts most; it is stable, so equal keys stay in index order.
    order = np.lexsort((-flat, ~live))
    kept = np.zeros(flat.size, dtype=bool)
    kept[order[:keep]] = True
    masks, start = {}, 0
    for name, score in scores.items():
        part = kept[start : start + score.numel()]
        masks[name] = torch.from_numpy(part.copy()).view(score.shape)
        start += score.numel()
    return masks


def kept_by_round(total: int, sparsity: float, rounds: int, schedule: str) -> list[int]:
    """Weights left after each round: `total - int((1 - d_r) * total)`, the last one by floor."""
    density = 1.0 - sparsity
    kept = []
    for step in range(1, rounds):
        fraction = step / rounds
        d = density**fraction if schedule == "exponential" else 1.0 - (1.0 - density) * fraction
        kept.append(total - int((1.0 - d) * total))
    return [*kept, total - math.floor(sparsity * total)]


def synflow_oracle(
    model: nn.Module,
    example_input: Tensor,
    sparsity: float,
    rounds: int = 100,
    *,
    p_net: int = 1,
    p_score: int = 1,
    log_score: bool = False,
    variant: str = "paper",
    norm: str = "scale",
    keep_bias: bool = False,
    schedule: str = "exponential",
) -> SynFlowRun:
    """Run all rounds: score, then keep exactly the round's count; pruned weights never return."""
    masks: Tensors = {
        name: torch.ones(parameter.shape, dtype=torch.bool)
        for name, (_, parameter) in prunable(model).items()
    }
    total = sum(mask.numel() for mask in masks.values())
    counts = kept_by_round(total, sparsity, rounds, schedule)
    log_totals: list[float] = []
    scores: Tensors = {}
    for keep in counts:
        log_total, scores = flow_scores(
            model,
            example_input,
            masks,
            p_net=p_net,
            p_score=p_score,
            log_score=log_score,
            variant=variant,
            norm=norm,
            keep_bias=keep_bias,
        )
        log_totals.append(log_total)
        masks = keep_exactly(scores, masks, keep)
    return SynFlowRun(masks, log_totals, counts, scores)
