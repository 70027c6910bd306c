"""Whole training steps of one layer: packed, dense with masks attached, torch.nn.utils.prune."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import paikern as pk

Contenders = dict[str, Callable[[], object]]


def step(weight: Tensor, packed: pk.PackedWeight, x: Tensor) -> Contenders:
    """Forward, the gradients for x and the weight, and Adam's update.

    Without packing the product is that of `nn.Linear`, hence MKL.
    """
    mask = packed.to_dense().detach() != 0
    masks = pk.MaskSet.from_bool({"0.weight": mask})
    ours, attached, torch_pruned = (_network(weight) for _ in range(3))
    pk.sparsify(ours, masks, force=True)
    masks.apply(attached)
    prune.custom_from_mask(torch_pruned[0], "weight", mask)
    optimizer = torch.optim.Adam(attached.parameters())
    masks.attach(attached, optimizer)
    g = torch.randn(x.shape[0], weight.shape[0])
    return {
        "paikern": _one_step(ours, torch.optim.Adam(ours.parameters()), x, g),
        "mkl": _one_step(attached, optimizer, x, g),
        "masked each call": _one_step(
            torch_pruned, torch.optim.Adam(torch_pruned.parameters()), x, g
        ),
    }


def memory(size: int, sparsity: float) -> dict[str, float]:
    """Bytes of weight, gradient and Adam's state of one layer after a step, packed and dense."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    masks = pk.MaskSet.from_bool({"0.weight": weight > weight.flatten().quantile(sparsity)})
    dense = _network(weight)
    packed = pk.sparsify(_network(weight), masks, force=True)
    found = {}
    for name, net in (("packed", packed), ("dense", dense)):
        optimizer = torch.optim.Adam(net.parameters())
        _one_step(net, optimizer, torch.randn(4, size), torch.randn(4, size))()
        held = [p.grad for p in net.parameters()]
        held += [v for state in optimizer.state.values() for v in state.values() if v.dim()]
        layer = net[0].weight
        bytes_of = sum(t.numel() * t.element_size() for t in held if t is not None)
        own = layer.nbytes if isinstance(layer, pk.PackedWeight) else layer.numel() * 4
        found[name] = float(bytes_of + own)
    return {"sparsity": sparsity, **found, "ratio": found["packed"] / found["dense"]}


def _network(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(layer)


def _one_step(
    net: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor, g: Tensor
) -> Callable[[], object]:
    x = x.clone().requires_grad_()

    def action() -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            x.grad = None
            net(x).backward(g)
            optimizer.step()

    return action
