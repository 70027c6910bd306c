"""What the methods that differentiate a loss have in common: the data, the loss, the mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from paikern.gradients import Network, make_loss
from paikern.scorers.base import Run
from paikern.scorers.data_scorer import DataScorer


@dataclass
class GradientScorer(DataScorer):
    """A scorer that runs the model on `data` and differentiates `loss_fn`.

    Args:
        batches, batch_size: as in `DataScorer`.
        mode: "train" or "eval", of the model while it is scored.

    The model is left as it was: weights, buffers, gradients, modes and random states. Batches are
    added in the order of the data; of unequal sizes, each counts by its number of samples.
    """

    mode: str = "train"

    needs_labels: ClassVar[bool] = True
    takes_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("train", "eval"):
            raise ValueError(f"mode must be 'train' or 'eval', got {self.mode!r}")

    def default_loss(self, run: Run) -> str | None:
        """What is differentiated where the caller gives no `loss_fn`; None as `make_loss` says."""
        return None

    def network(self, run: Run, temperature: float = 1.0) -> Network:
        """The model under the masks of this round."""
        loss_fn = self.default_loss(run) if run.loss_fn is None else run.loss_fn
        return Network(run, make_loss(loss_fn, temperature), self.mode)

    def gradients(self, run: Run, *, mean: bool = False) -> dict[str, Tensor]:
        """`Network.gradients` of the batches of this round; a note where all of them are 0."""
        network = self.network(run)
        with network.running():
            found = network.gradients(self.read(run), mean=mean)
        self.note_zeros(run, found)
        return found

    def note_zeros(self, run: Run, found: Mapping[str, Tensor]) -> None:
        """Say so where all gradients are 0."""
        if not any(bool(gradient.any()) for gradient in found.values()):
            run.notes.append(
                f"{self.name}: scores carry no information: every gradient is 0, so weights are "
                "kept by their position; look at the data and the loss"
            )
