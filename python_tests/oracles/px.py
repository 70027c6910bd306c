"""PX by float64 autograd of its definition, sample by sample, and by listing every path.

    R = sum_n sum_k g_k(x_n**2) h_k,   S_l = W_l**2 * dR/dW_l**2

f, g and h are three copies of the model whose ReLUs are replaced; nothing is factored.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from python_tests.oracles.paths import prunable

Tensors = dict[str, Tensor]
Masks = Mapping[str, Tensor] | None


class _Gate(nn.Module):
    """A ReLU of f, g or h; `shared` carries the gates from f to g in the order of the calls."""

    def __init__(self, network: str, shared: list[Tensor]) -> None:
        super().__init__()
        self.network, self.shared = network, shared

    def forward(self, x: Tensor) -> Tensor:
        if self.network == "f":
            self.shared.append((x > 0).double())
            return x.clamp(min=0)
        return x * self.shared.pop(0) if self.network == "g" else x


class _Scale(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(1, -1, *(1 for _ in x.shape[2:]))


def _network(
    model: nn.Module, network: str, masks: Masks, shared: list[Tensor], norm: str = "scale"
) -> nn.Module:
    work = copy.deepcopy(model).double().eval()
    for name, (module, parameter) in prunable(work).items():
        mask = torch.ones_like(parameter) if masks is None else masks[name].double()
        value = {"f": parameter, "g": torch.ones_like(parameter), "h": parameter**2}[network]
        parameter.data = (value * mask).detach()
        if network != "f" and getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
    for parent in list(work.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, key, _Gate(network, shared))
            elif isinstance(child, nn.BatchNorm2d) and network != "f":
                scale = child.weight.detach() ** 2 / (child.running_var + child.eps)
                identity = network == "g" or norm == "identity"
                setattr(parent, key, nn.Identity() if identity else _Scale(scale))
    return work


def px_cotangent(model: nn.Module, data: Tensor, masks: Masks = None) -> Tensor:
    """c_k = sum_n g_k(x_n**2), one sample at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for x in data.double().split(1):
        shared: list[Tensor] = []
        _network(model, "f", masks, shared)(x)
        total = total + _network(model, "g", masks, shared)(x**2).detach()
    return total


def px_scores(
    model: nn.Module, data: Tensor, masks: Masks = None, norm: str = "scale"
) -> tuple[float, Tensors]:
    """R and the scores by parameter name."""
    h = _network(model, "h", masks, [], norm)
    weights = {name: parameter for name, (_, parameter) in prunable(h).items()}
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for x in data.split(1):
        paths = px_cotangent(model, x, masks)
        total = total + (paths * h(torch.ones_like(x, dtype=torch.float64))).sum()
    gradients = torch.autograd.grad(total, list(weights.values()))
    scores = {n: w.detach() * g for (n, w), g in zip(weights.items(), gradients, strict=True)}
    return total.item(), scores


def px_by_paths(layers: Sequence[Tensor], masks: Sequence[Tensor], data: Tensor) -> list[Tensor]:
    """Scores of an MLP without biases from every pair of an open path and a path to one output."""
    widths = [layers[0].shape[1], *(len(w) for w in layers)]
    last = widths[-1]
    c = [0.0] * last
    for x in data.tolist():
        gates, values = [], torch.tensor(x, dtype=torch.float64)
        for w, m in zip(layers, masks, strict=True):
            values = (w.double() * m) @ values
            gates.append(values > 0)
            values = values.clamp(min=0)
        for units in itertools.product(*map(range, widths)):
            kept = all(m[b, a] for m, (a, b) in zip(masks, itertools.pairwise(units), strict=True))
            hidden = zip(gates[:-1], units[1:-1], strict=True)
            if kept and all(gate[unit] for gate, unit in hidden):
                c[units[-1]] += x[units[0]] ** 2
    scores = [torch.zeros(w.shape, dtype=torch.float64) for w in layers]
    for units in itertools.product(*map(range, widths)):
        product = c[units[-1]]
        for w, m, (a, b) in zip(layers, masks, itertools.pairwise(units), strict=True):
            product *= float(w[b, a]) ** 2 * bool(m[b, a])
        for score, (a, b) in zip(scores, itertools.pairwise(units), strict=True):
            score[b, a] += product
    return scores
