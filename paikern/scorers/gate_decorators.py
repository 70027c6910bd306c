"""Gate Decorators: keep the channels whose gate changes the loss most, the gate being batch norm's.

    y = gate * (x_hat + beta'),   gate = gamma,   beta' = clamp(beta / gamma, -10, 10)
    S = sum_b |gate * dL_b / dgate|  -  eta * (area of the map) * (live channels)

with gate = beta' = 0 where gamma is 0. This is the scoring of a "tick", of which
`pk.pruner("gate_decorators", ...)` makes several between the "tocks" that train the network.

Source: You et al. 2019, "Gate Decorator" (arXiv:1909.08174), section 3.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paikern import ops
from paikern.gradients import make_loss
from paikern.gradients.gates import GateNetwork
from paikern.gradients.network import weighted
from paikern.pathgraph.channels import ChannelGroup, ChannelGroups
from paikern.scorers.base import Run, register_scorer
from paikern.scorers.channel_scorer import by_output
from paikern.scorers.gated_scorer import GatedScorer
from paikern.scorers.norm_scorer import norm_sums, normed, norms_of


@register_scorer("gate_decorators")
class GateDecorators(GatedScorer):
    """`sum_b |gate * dL_b / dgate|` of the batch norms that read a channel, added up.

    Args:
        minimal_ratio: the fraction of each group's channels, the best of them, that always stays.
        eta: of the term that prefers channels of costly layers: for each batch norm that reads a
            channel, the pixels of its map times the group's channels that are left there. Scores
            are sums over the batches, so it has to grow with their number.
        batches, batch_size, mode, target: as in `snap`. The absolute value is taken batch by batch,
            as in the paper, so the size of the batches matters.

    Layers that no batch norm follows keep all of their channels.

    Raises:
        ValueError: no batch norm with weights.

    Example:
        >>> import torch, paikern as pk
        >>> net = pk.zoo.create("resnet20", image_size=8, seed=0)
        >>> x = torch.eye(8).expand(8, 3, 8, 8)
        >>> masks = pk.prune(net, "gate_decorators", sparsity=0.25, data=(x, torch.arange(8)))
        >>> masks.node_sparsity
        0.25
    """

    minimal_ratio: float = 0.1
    eta: float = 0.0

    summary: ClassVar[str] = "channels whose batch-norm gate changes the loss; structured"
    source: ClassVar[str] = "You et al. 2019, section 3"
    cost: ClassVar[str] = "3F"
    weakness: ClassVar[str] = (
        "needs batch norm; the best tenth of each group stays, which bounds the sparsity"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.minimal_ratio, (int, float)) or not 0 <= self.minimal_ratio <= 1:
            raise ValueError(f"minimal_ratio must be in [0, 1], got {self.minimal_ratio}")
        if not isinstance(self.eta, (int, float)) or not 0 <= self.eta < math.inf:
            raise ValueError(f"eta must be >= 0 and finite, got {self.eta}")

    @property
    def least(self) -> float:
        return self.minimal_ratio

    def groups(self, run: Run) -> ChannelGroups:
        return normed(run, super().groups(run), self.name)

    def channel_scores(self, run: Run, groups: ChannelGroups) -> dict[str, Tensor]:
        paths = list(dict.fromkeys(path for group in groups for path in norms_of(run, group)))
        gammas = {path: run.state[f"{path}.weight"].detach() for path in paths}
        shifts = {
            path: _shift(gammas[path], run.state[f"{path}.bias"].detach())
            for path in paths
            if f"{path}.bias" in run.state
        }

        def values(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
            made = {f"{path}.weight": gate for path, gate in gates.items()}
            return made | {f"{path}.bias": gates[path] * shift for path, shift in shifts.items()}

        held = run.cache.get("gates", gammas)
        network = GateNetwork(run, make_loss(run.loss_fn), self.mode, held, values)
        gates = network.weights
        found = {
            path: torch.zeros_like(gamma, dtype=torch.float64) for path, gamma in gammas.items()
        }
        slopes: dict[str, Tensor] = {}

        def add(path: str, slope: Tensor) -> None:
            found[path] += (gates[path].detach().double() * slope.double()).abs()
            slopes[path] = slope

        with network.running(), _areas(run, paths) as areas:
            for number, (batch, share) in enumerate(weighted(self.read(run))):
                network.differentiate(batch, add, number, share)
                with torch.no_grad():
                    self.train_gates(run, gates, slopes)
        run.cache["gate_areas"] = areas
        run.cache["gates"] = {path: gate.detach() for path, gate in gates.items()}
        run.cache["gate_shifts"] = shifts
        return norm_sums(run, groups, found)

    def train_gates(
        self, run: Run, gates: Mapping[str, Tensor], slopes: Mapping[str, Tensor]
    ) -> None:
        """What becomes of the gates after each batch, in place; they stay as they are here."""

    def preferred(
        self, run: Run, groups: ChannelGroups, scores: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if self.eta == 0:
            return scores
        areas = run.cache["gate_areas"]
        ranked = {}
        for group in groups:
            alive = _alive(run, group)
            costs = torch.zeros(group.size, dtype=torch.float64)
            for path, channels in norms_of(run, group).items():
                ours = channels[channels >= 0]
                cost = areas[path] * int(alive[ours].sum())
                costs.index_add_(0, ours, torch.full((len(ours),), cost, dtype=torch.float64))
            ranked[group.name] = scores[group.name] - self.eta * costs
        return ranked


@contextlib.contextmanager
def _areas(run: Run, paths: list[str]) -> Iterator[dict[str, int]]:
    """Pixels of the first map that goes through each batch norm inside, by the norm's path."""
    areas: dict[str, int] = {}

    def look(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            areas.setdefault(path, out.shape[2:].numel())

        return note

    handles = [run.model.get_submodule(p).register_forward_hook(look(p)) for p in paths]
    try:
        yield areas
    finally:
        for handle in handles:
            handle.remove()


def _alive(run: Run, group: ChannelGroup) -> Tensor:
    """The channels that earlier rounds have left, bool `[size]`."""
    if not run.masks:
        return torch.ones(group.size, dtype=torch.bool)
    alive = torch.zeros(group.size, dtype=torch.bool)
    for name, rows in group.rows.items():
        mask = ops.unpack_mask(run.masks[name].cpu(), run.shapes[name])
        alive[rows[by_output(mask, *run.layers[name].layout).any(1)]] = True
    return alive


def _shift(gamma: Tensor, beta: Tensor) -> Tensor:
    """beta / gamma in [-10, 10], 0 where gamma is 0."""
    return torch.where(gamma == 0, 0.0, beta / gamma).clamp(-10, 10)
