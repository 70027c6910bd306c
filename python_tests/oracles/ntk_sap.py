"""NTK-SAP by autograd: both networks in one graph with one explicit mask, drawn as documented.

Draws are made in float32 from one generator: for each resample and batch the parameters in the
order of the model, the inputs, the changes in the order of the layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]


def _fresh(model: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> Tensors:
    """Kaiming normal weights, zero biases, unit norms; embeddings as they are."""
    owners = {
        id(p): (module, key)
        for module in model.modules()
        for key, p in module.named_parameters(recurse=False)
    }
    found = {}
    for name, parameter in model.named_parameters():
        module, key = owners[id(parameter)]
        kind = type(module).__name__
        value = parameter.detach()
        if key == "bias":
            value = torch.zeros_like(value)
        elif "Norm" in kind:
            value = torch.ones_like(value)
        elif kind == "Conv1D":
            inputs = parameter.shape[0]
            value = torch.randn(parameter.shape, generator=generator) * (2 / inputs) ** 0.5
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            inputs = parameter[0].numel()
            value = torch.randn(parameter.shape, generator=generator) * (2 / inputs) ** 0.5
        found[name] = value.to(dtype)
    return found


def _statistics(model: nn.Module, run: Any, variant: str) -> Tensor | None:
    """Set the running statistics of all batch norms; the paper's way also gives the output."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if variant == "published":
        model.train()
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            run()
        model.eval()
        return None

    def hook(norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        x = args[0].detach().transpose(0, 1).flatten(1)
        norm.running_mean = x.mean(1)
        norm.running_var = (x - x.mean(1, keepdim=True)).square().mean(1)

    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    output = run()
    for handle in handles:
        handle.remove()
    return output


def ntk_sap_scores(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    *,
    seed: int = 0,
    resamples: int = 1,
    epsilon: float = 0.01,
    variant: str = "paper",
    masks: Mapping[str, Tensor] | None = None,
    own: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    """`|dJ/dc|` at c = `masks`; 0 for what they prune. `own`: the given weights and inputs."""
    generator = torch.Generator().manual_seed(seed)
    c = {
        n: (torch.ones(p.shape) if masks is None else masks[n]).to(dtype).requires_grad_()
        for n, p in model.named_parameters()
        if n in names
    }
    total: Tensor = torch.zeros((), dtype=dtype)
    for _ in range(resamples):
        for batch in batches:
            work = copy.deepcopy(model).to(dtype).eval()
            theta = {n: p.detach() for n, p in work.named_parameters()}
            theta = theta if own else _fresh(model, generator, dtype)
            if isinstance(batch, Mapping):
                args, keywords = (), {k: v for k, v in batch.items() if k != "labels"}
            else:
                x = batch[0] if own else torch.randn(batch[0].shape, generator=generator)
                args, keywords = (x.to(dtype),), {}
            xi = {n: torch.randn(c[n].shape, generator=generator).to(dtype) for n in names}

            def run(
                moved: float,
                work: nn.Module = work,
                theta: Tensors = theta,
                xi: Tensors = xi,
                args: Any = args,
                keywords: Any = keywords,
            ) -> Tensor:
                weights = theta | {n: c[n] * (theta[n] + moved * xi[n]) for n in names}
                output = functional_call(work, weights, args, keywords)
                return output if isinstance(output, Tensor) else output.logits

            near = _statistics(work, lambda: run(0.0), variant)
            near = run(0.0) if near is None else near
            total = total + (near - run(epsilon)).square().sum()
    found = torch.autograd.grad(total, [c[n] for n in names])
    return {n: g.abs() * (c[n].detach() != 0) for n, g in zip(names, found, strict=True)}
