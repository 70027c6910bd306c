"""Pruning during training: `pk.pruner`, called at the end of every epoch."""

from paikern.training.asni import ASNI
from paikern.training.base import Event, Pruner, Settings
from paikern.training.centroids import Centroids
from paikern.training.earlybird import EarlyBird
from paikern.training.earlycrop import EarlyCroPS, EarlyCroPU
from paikern.training.gate_decorators import TickTock
from paikern.training.imp import IMP, LTR
from paikern.training.once import OneShot
from paikern.training.registry import (
    pruner,
    pruner_names,
    pruner_rows,
    register_pruner,
)

__all__ = [
    "ASNI",
    "Centroids",
    "EarlyBird",
    "EarlyCroPS",
    "EarlyCroPU",
    "Event",
    "IMP",
    "LTR",
    "OneShot",
    "Pruner",
    "Settings",
    "TickTock",
    "pruner",
    "pruner_names",
    "pruner_rows",
    "register_pruner",
]
