"""Channel scores by gates that really are in the model, in float64, and their selection by hand.

Independent of the engine: gates are forward hooks that multiply outputs, derivatives are autograd's
own, couplings come from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Batches = Sequence[tuple[Tensor, Tensor]]


class Gated:
    """`net` in float64 with a gate for every output of the named layers."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        self.net = net.double()
        self.layers = {name: net.get_submodule(name) for name in names}
        self.gates = {}
        for name, layer in self.layers.items():
            linear = isinstance(layer, nn.Linear)
            size = layer.out_features if linear else layer.out_channels
            gate = torch.ones(size, dtype=torch.float64, requires_grad=True)
            self.gates[name] = gate
            shape = (-1,) if linear else (1, -1, 1, 1)
            layer.register_forward_hook(
                lambda module, args, out, gate=gate, shape=shape: out * gate.view(shape)
            )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention has one derivative only
            return nn.functional.cross_entropy(self.net(x.double()), y)

    def weights(self) -> list[Tensor]:
        return [
            module.weight
            for module in self.net.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        ] + [m.in_proj_weight for m in self.net.modules() if isinstance(m, nn.MultiheadAttention)]

    def snap(self, batches: Batches) -> dict[str, Tensor]:
        gates = list(self.gates.values())
        total = [torch.zeros_like(gate) for gate in gates]
        for x, y in batches:
            for sum_, slope in zip(total, torch.autograd.grad(self.loss(x, y), gates), strict=True):
                sum_ += slope
        return {name: slope.abs() for name, slope in zip(self.gates, total, strict=True)}

    def crop(self, batches: Batches, *, by_gates: bool) -> dict[str, Tensor]:
        """First derivatives by the weights, or by the gates; the second always by the gates."""
        gates = list(self.gates.values())
        leaves = gates if by_gates else self.weights()
        mean = [torch.zeros_like(leaf) for leaf in leaves]
        for x, y in batches:
            for sum_, slope in zip(mean, torch.autograd.grad(self.loss(x, y), leaves), strict=True):
                sum_ += slope.detach()
        total = [torch.zeros_like(gate) for gate in gates]
        for x, y in batches:
            slopes = torch.autograd.grad(self.loss(x, y), leaves, create_graph=True)
            z = sum((g * s).sum() for g, s in zip(mean, slopes, strict=True))
            for sum_, slope in zip(total, torch.autograd.grad(z, gates), strict=True):
                sum_ += slope
        return {name: slope.abs() for name, slope in zip(self.gates, total, strict=True)}


class GatedNorm(nn.Module):
    """Batch norm as gate * (x_hat + shift)."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(norm.num_features, affine=False).double()
        self.norm.load_state_dict(
            {k: v for k, v in norm.state_dict().items() if k not in ("weight", "bias")}
        )
        gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
        shift = [
            b / g if g != 0 else 0.0 for g, b in zip(gamma.tolist(), beta.tolist(), strict=True)
        ]
        self.gate = nn.Parameter(gamma)
        shift = [max(-10.0, min(10.0, s)) for s in shift]
        self.shift = torch.tensor(shift, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        view = (1, -1, 1, 1)
        return self.gate.view(view) * (self.norm(x) + self.shift.view(view))


def gate_decorators(net: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """`sum_b |gate * dL_b / dgate|` by the path of each batch norm."""
    net = net.double()
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for path in paths:
        parent, _, key = path.rpartition(".")
        setattr(net.get_submodule(parent), key, GatedNorm(net.get_submodule(path)))
    net.train()
    found = {}
    for x, y in batches:
        net.zero_grad()
        nn.functional.cross_entropy(net(x.double()), y).backward()
        for path in paths:
            gate = net.get_submodule(path).gate
            found[path] = found.get(path, 0) + (gate.detach() * gate.grad).abs()
    return found


def select(
    scores: Mapping[str, Tensor], nodes: Mapping[str, int], keep: int
) -> dict[str, list[bool]]:
    """The channels of each group that stay: the best of each, then the best of all that make up
    the number exactly, or the next lower one that can be made up.

    nodes: how many outputs one channel of a group stands for; `keep` counts outputs.
    """
    kept = {name: [False] * len(values) for name, values in scores.items()}
    order = [(-float(s), g, c) for g, name in enumerate(scores) for c, s in enumerate(scores[name])]
    names, left = list(scores), keep
    rest = []
    for name in names:
        best = min(range(len(scores[name])), key=lambda c: (-float(scores[name][c]), c))
        kept[name][best] = True
        left -= nodes[name]
    for _, group, channel in sorted(order):
        name = names[group]
        if not kept[name][channel]:
            rest.append((name, channel))
    sums = [{0}]  # that the channels from each place on can make up
    for name, _ in reversed(rest):
        sums.append(sums[-1] | {s + nodes[name] for s in sums[-1]})
    left = max((s for s in sums[-1] if s <= left), default=0)
    for at, (name, channel) in enumerate(rest, 1):
        if left - nodes[name] in sums[len(rest) - at]:
            kept[name][channel] = True
            left -= nodes[name]
    return kept


def nodes_kept(total: int, sparsity: float) -> int:
    return total - math.floor(sparsity * total)
