"""EarlyBird: the channels that batch norm finds important settle early; prune when they have.

After each epoch the `floor(s * C)` channels with the smallest |gamma| of all C batch-norm channels
are marked. The distance of two marks is the fraction of the C channels in which they differ. The
ticket is drawn when the newest of five marks is within 0.1 of each of the four before it; until
then every step adds `penalty * sign(gamma)` to the gradient of gamma.

Source: You et al. 2020 (arXiv:1909.11957), section 3. Their threshold (|gamma| above the sorted
value of index int(C * s)) removes one channel more, and all that tie; here the count is exact and
ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paikern import ops
from paikern.budget import keep_count
from paikern.training.base import Event, check_finite
from paikern.training.once import PrunesOnce
from paikern.training.penalty import NormPenalty, batch_norm_scales
from paikern.training.registry import register_pruner


@register_pruner("earlybird_ticket")
class EarlyBird(PrunesOnce):
    """Channels by |gamma| of batch norm, once the choice of channels has settled.

    `sparsity` is a fraction of the channels.

    Args:
        method: the score that prunes in the end.
        method_options: options of that method, and of `pk.prune`.
        penalty: L1 subgradient on gamma until the ticket; 0 for none.
        window: how many marks must agree.
        tolerance: the largest distance between the newest and each of the others.
    """

    method: str = "earlybird"
    penalty: float = 1e-4
    window: int = 5
    tolerance: float = 0.1

    summary = "channels by batch norm's |gamma|, at the epoch in which their choice settles"
    source = "You et al. 2020"

    def begin(self) -> None:
        super().begin()
        if self.window < 2:
            raise ValueError(f"window must be >= 2, got {self.window}")
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance must be in [0, 1], got {self.tolerance}")
        self._penalty = NormPenalty(self.model, self.settings.optimizers, self.penalty)
        scales = batch_norm_scales(self.model)
        if not scales:
            raise ValueError(
                f"model: {type(self.model).__name__} has no batch norm with weights, by which "
                "channels are chosen; use l1_filters"
            )
        self._channels = sum(scale.numel() for scale in scales.values())
        self._marks: list[Tensor] = []
        self._penalty.hold()

    def epoch_end(self, model: nn.Module, epoch: int, data: Any) -> Event:
        if self.pruned_at is not None:
            return self.over(epoch)
        scales = batch_norm_scales(model)
        check_finite(scales, f"epoch {epoch}")
        mark = self._mark(scales)
        marks = [*self._marks, mark][-self.window :]
        distances = [_distance(mark, other) / self._channels for other in marks[:-1]]
        values = {"distance": max(distances)} if distances else {}
        if len(marks) == self.window and max(distances) <= self.tolerance:
            why = f"{self.window} choices of channels differ by at most {max(distances):.3g}"
            event = self.prune_now(model, epoch, data, why, **values)
            self._penalty.let_go()
            self._marks = marks
            return event
        self._marks = marks
        if epoch >= self.settings.epochs:
            reason = (
                f"no ticket in {epoch} epochs: "
                + (f"{self.window} are needed" if len(marks) < self.window else "still changing")
            )  # fmt: skip
            return self.event(epoch, reason, values=values)
        return self.event(epoch, "the choice of channels has not settled", values=values)

    def remove(self) -> None:
        super().remove()
        self._penalty.let_go()

    def tensors(self) -> dict[str, Tensor]:
        return {f"mark/{index}": mark for index, mark in enumerate(self._marks)}

    def restore(self, progress: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().restore(progress, tensors)
        count = sum(key.startswith("mark/") for key in tensors)
        self._marks = [tensors[f"mark/{index}"].cpu() for index in range(count)]
        self._penalty.let_go()
        if self.pruned_at is None:
            self._penalty.hold()

    def _mark(self, scales: Mapping[str, Tensor]) -> Tensor:
        """The channels that would stay, packed."""
        kept = keep_count(self._channels, self.sparsity)
        flat = torch.cat([scale.detach().flatten().float() for scale in scales.values()])
        return ops.topk_mask(flat, kept, absolute=True, names=["batch norm"])[0].cpu()


def _distance(a: Tensor, b: Tensor) -> int:
    """In how many bits two packed masks differ."""
    different = torch.bitwise_xor(a, b)
    return int(ops.unpack_mask(different, (different.numel() * 8,)).sum())
