"""The gradient family in float64, written from the formulas: one graph over all batches.

    c = m as a leaf, W = w * c:  dL/dc = w * dL/dW        (SNIP, IterSNIP, FORCE)
    u = w * m as a leaf, W = u:  g = dL/du, Hg = d<g, dL/du>/du   (GraSP, GraSP-It, CroP)

L is the sum of the mean losses of the batches. Weights are replaced through parametrizations, so
the model's own forward runs; nothing of paikern is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from python_tests.oracles.synflow import kept_by_round

Tensors = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Scorer = Callable[[nn.Module, Sequence[Any], Mapping[str, Tensor]], Tensors]


class _Times(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


class _Instead(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, weight: Tensor) -> Tensor:
        return self.value


def weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Parameter name -> Linear, Conv or transformers Conv1D, embedding heads left out."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if (isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D")
        and id(module.weight) not in tied
    }


def ones(model: nn.Module) -> Tensors:
    return {n: torch.ones(m.weight.shape).bool() for n, m in weighted_modules(model).items()}


def _work(model: nn.Module, mode: str) -> nn.Module:
    work = copy.deepcopy(model).double().train(mode == "train")
    if hasattr(work, "set_attn_implementation"):
        work.set_attn_implementation("eager")
    return work


def _loss(work: nn.Module, batches: Sequence[Any], temperature: float, loss: str) -> Tensor:
    measure: Loss = F.cross_entropy if loss == "cross_entropy" else F.nll_loss
    total = torch.zeros((), dtype=torch.float64)
    first = None
    for batch in batches:
        if isinstance(batch, Mapping):
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            scores, labels = work(**inputs).logits, batch["labels"]
            if scores.dim() == 3:  # the next token
                scores, labels = scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            size = len(batch["labels"])
        else:
            scores, labels = work(batch[0].double()), batch[1]
            size = len(labels)
        first = first or size
        total = total + measure(scores / temperature, labels) * (size / first)
    return total


def mask_gradient(
    model: nn.Module,
    batches: Sequence[Any],
    masks: Mapping[str, Tensor],
    *,
    mode: str = "train",
    loss: str = "cross_entropy",
) -> Tensors:
    """dL/dc at c = m."""
    work = _work(model, mode)
    factors = {}
    for name, module in weighted_modules(work).items():
        factors[name] = masks[name].double().requires_grad_()
        parametrize.register_parametrization(module, "weight", _Times(factors[name]))
    value = _loss(work, batches, 1.0, loss)
    found = torch.autograd.grad(value, list(factors.values()), allow_unused=True)
    return _filled(factors, found)


def gradient_and_product(
    model: nn.Module,
    batches: Sequence[Any],
    masks: Mapping[str, Tensor],
    *,
    mode: str = "train",
    temperature: float = 1.0,
    loss: str = "cross_entropy",
    masked: bool = False,
) -> tuple[Tensors, Tensors]:
    """g and Hg at u = w * m; with `masked`, H is multiplied by g * m."""
    work = _work(model, mode)
    leaves = {}
    for name, module in weighted_modules(work).items():
        leaves[name] = (module.weight.detach() * masks[name]).requires_grad_()
        parametrize.register_parametrization(module, "weight", _Instead(leaves[name]))
    value = _loss(work, batches, temperature, loss)
    slopes = _filled(
        leaves,
        torch.autograd.grad(value, list(leaves.values()), create_graph=True, allow_unused=True),
    )
    fixed = {n: g.detach() * (masks[n] if masked else 1.0) for n, g in slopes.items()}
    z = sum((fixed[n] * g).sum() for n, g in slopes.items())
    assert isinstance(z, Tensor)
    product = torch.autograd.grad(z, list(leaves.values()), allow_unused=True)
    return {n: g.detach() for n, g in slopes.items()}, _filled(leaves, product)


def _filled(leaves: Tensors, found: Sequence[Tensor | None]) -> Tensors:
    pairs = zip(leaves.items(), found, strict=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in pairs}


def dense_weights(model: nn.Module) -> Tensors:
    return {n: m.weight.detach().double() for n, m in weighted_modules(model).items()}


# --- scores, higher is kept ----------------------------------------------------------------------


def snip(model: nn.Module, batches: Sequence[Any], masks: Mapping[str, Tensor]) -> Tensors:
    return {n: c.abs() for n, c in mask_gradient(model, batches, masks).items()}


def itersnip(model: nn.Module, batches: Sequence[Any], masks: Mapping[str, Tensor]) -> Tensors:
    return {n: c.abs() * masks[n] for n, c in mask_gradient(model, batches, masks).items()}


force = snip  # dL/dc = w_dense * dL/dW also where m = 0


def grasp_it(model: nn.Module, batches: Sequence[Any], masks: Mapping[str, Tensor]) -> Tensors:
    slopes, _ = gradient_and_product(model, batches, masks)
    return {n: g * g * masks[n] for n, g in slopes.items()}


def grasp(
    model: nn.Module,
    batches: Sequence[Any],
    masks: Mapping[str, Tensor],
    temperature: float = 200.0,
) -> Tensors:
    weights = dense_weights(model)
    _, product = gradient_and_product(model, batches, masks, temperature=temperature, masked=True)
    return {n: weights[n] * masks[n] * h for n, h in product.items()}


def crop(model: nn.Module, batches: Sequence[Any], masks: Mapping[str, Tensor]) -> Tensors:
    weights = dense_weights(model)
    _, product = gradient_and_product(model, batches, masks, mode="eval", masked=True)
    return {n: (weights[n] * masks[n] * h).abs() for n, h in product.items()}


# --- rounds --------------------------------------------------------------------------------------


def select(scores: Tensors, kept: int, among: Mapping[str, Tensor] | None = None) -> Tensors:
    """The `kept` largest over all layers; ties to the lower index; only `among` where given."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    if among is not None:
        allowed = torch.cat([among[n].flatten() for n in scores])
        flat = flat.masked_fill(~allowed, -torch.inf)
    order = torch.sort(flat, descending=True, stable=True).indices
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[order[:kept]] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {n: p.view(s.shape) for (n, s), p in zip(scores.items(), parts, strict=True)}


def rounds(
    model: nn.Module,
    batches: Sequence[Any],
    scorer: Scorer,
    sparsity: float,
    count: int,
    *,
    may_return: bool = False,
) -> list[Tensors]:
    """The masks after each of `count` rounds on an exponential schedule."""
    masks = ones(model)
    total = sum(m.numel() for m in masks.values())
    made = []
    for kept in kept_by_round(total, sparsity, count, "exponential"):
        scores = scorer(model, batches, masks)
        masks = select(scores, kept, None if may_return else masks)
        made.append(masks)
    return made
