"""One file a method. Importing this package registers them all."""

from paikern.scorers.base import (
    MaskBuilder,
    Run,
    Scorer,
    TrainedScorer,
    make_scorer,
    register_scorer,
    scorer_class,
    scorer_names,
)
from paikern.scorers.channel_scorer import ChannelScorer
from paikern.scorers.crop import CroPitU, CroPU
from paikern.scorers.crop_s import CroPitS, CroPS
from paikern.scorers.data_scorer import DataScorer
from paikern.scorers.dpai import DPaI, DPaITrainer, StepStatistics
from paikern.scorers.earlybird import EarlyBirdChannels
from paikern.scorers.force import FORCE
from paikern.scorers.gate_decorators import GateDecorators
from paikern.scorers.gradient_scorer import GradientScorer
from paikern.scorers.grasp import GraSP
from paikern.scorers.grasp_it import GraSPIt
from paikern.scorers.itersnip import IterSNIP
from paikern.scorers.l1_filters import L1Filters
from paikern.scorers.magnitude import Magnitude
from paikern.scorers.npb import NPB
from paikern.scorers.ntk_sap import NTKSAP
from paikern.scorers.phew import PHEW
from paikern.scorers.prospr import ProsPr
from paikern.scorers.prospr_s import ProsPrS
from paikern.scorers.px import PX
from paikern.scorers.random import Random
from paikern.scorers.random_s import RandomS
from paikern.scorers.random_u import RandomU
from paikern.scorers.snap import SNAP
from paikern.scorers.snip import SNIP
from paikern.scorers.synflow import LogSynFlow, SynFlow, SynFlowL2
from paikern.scorers.wanda import Wanda
from paikern.scores import Dense, Factored, Product, Scores

__all__ = [
    "ChannelScorer",
    "CroPS",
    "CroPU",
    "CroPitS",
    "CroPitU",
    "DPaI",
    "DPaITrainer",
    "DataScorer",
    "Dense",
    "EarlyBirdChannels",
    "FORCE",
    "GateDecorators",
    "Factored",
    "GraSP",
    "GraSPIt",
    "GradientScorer",
    "L1Filters",
    "IterSNIP",
    "LogSynFlow",
    "Magnitude",
    "MaskBuilder",
    "ProsPr",
    "ProsPrS",
    "NPB",
    "NTKSAP",
    "PHEW",
    "PX",
    "Product",
    "Random",
    "RandomS",
    "RandomU",
    "Run",
    "SNAP",
    "SNIP",
    "Scorer",
    "Scores",
    "StepStatistics",
    "SynFlow",
    "SynFlowL2",
    "TrainedScorer",
    "Wanda",
    "make_scorer",
    "register_scorer",
    "scorer_class",
    "scorer_names",
]
