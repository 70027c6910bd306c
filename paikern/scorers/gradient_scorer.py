"""What the methods that differentiate a loss have in common: the data, the loss, the mode."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("train", "eval"):
            raise ValueError(f"mode must be 'train' or 'eval', got {self.mode!r}")

    def network(self, run: Run, temperature: float = 1.0) -> Network:
        """The model under the masks of this round."""
        return Network(run, make_loss(run.loss_fn, temperature), self.mode)
