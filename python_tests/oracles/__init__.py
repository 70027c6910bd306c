"""Float64 autograd oracles, written from the papers' definitions; they share no code with paikern.

paths       a model's own forward with path weights: totals, gradients, every layer's A, Z and G
topology    effective nodes, kernels, weights and log R_P of a masked model
synflow     the SynFlow family, round by round, with exact selection
brute_force every path of a tiny MLP, one by one
goldens     worked examples and published counts, as data
"""

from __future__ import annotations

from python_tests.oracles.paths import PathFlow, path_oracle, prunable
from python_tests.oracles.synflow import SynFlowRun, synflow_oracle
from python_tests.oracles.topology import LayerCounts, TopologyCounts, topology_oracle

__all__ = [
    "LayerCounts",
    "PathFlow",
    "SynFlowRun",
    "TopologyCounts",
    "path_oracle",
    "prunable",
    "synflow_oracle",
    "topology_oracle",
]
