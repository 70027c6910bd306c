"""Gradients of a model's loss for the methods that rank weights by them; the model is untouched."""

from paikern.gradients.loss import Loss, make_loss
from paikern.gradients.network import Network
from paikern.gradients.untouched import untouched

__all__ = ["Loss", "Network", "make_loss", "untouched"]
