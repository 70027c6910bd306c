"""Gradients of a model's loss for the methods that rank weights by them; the model is untouched."""

from paikern.gradients.loss import Loss, make_loss
from paikern.gradients.network import Network
from paikern.gradients.untouched import own_randomness, untouched

__all__ = ["Loss", "Network", "make_loss", "own_randomness", "untouched"]
