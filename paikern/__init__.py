"""paikern: pruning neural networks before they are trained, at the speed of memory.

Example:
    >>> import torch, paikern as pk
    >>> net = pk.zoo.create("mlp", sizes=(8, 16, 4))
    >>> masks = pk.prune(net, "dpai", sparsity=0.5, example_inputs=torch.ones(1, 8), steps=10)
    >>> masks.kept
    96
"""

from paikern import ops, training, zoo
from paikern.analysis import LayerTopology, Topology
from paikern.api import analyze, methods, prune, score, select
from paikern.backends.registry import backends
from paikern.budget import erk_densities
from paikern.errors import (
    BackendError,
    MaskFormatError,
    NonFiniteScoreError,
    PaikernError,
    PaikernWarning,
    PathRuleError,
    SparsityError,
)
from paikern.masks import MaskSet, load_masks
from paikern.pathgraph import register_path_rule
from paikern.scorers import register_scorer
from paikern.scores import Dense, Factored, Product, Scores
from paikern.shrink import shrink
from paikern.sparse import (
    MaskedConv1D,
    MaskedConv2d,
    MaskedLinear,
    PackedWeight,
    dense_keys,
    pack_keys,
)
from paikern.sparse.explain import explain
from paikern.sparse.swap import densify, sparsify
from paikern.training import pruner, register_pruner
from paikern.version import __version__

__all__ = [
    "BackendError",
    "Dense",
    "Factored",
    "LayerTopology",
    "MaskFormatError",
    "MaskSet",
    "MaskedConv1D",
    "MaskedConv2d",
    "MaskedLinear",
    "NonFiniteScoreError",
    "PackedWeight",
    "PaikernError",
    "PaikernWarning",
    "PathRuleError",
    "Product",
    "Scores",
    "SparsityError",
    "Topology",
    "__version__",
    "analyze",
    "backends",
    "dense_keys",
    "densify",
    "erk_densities",
    "explain",
    "load_masks",
    "methods",
    "ops",
    "pack_keys",
    "prune",
    "pruner",
    "register_path_rule",
    "register_pruner",
    "register_scorer",
    "score",
    "select",
    "shrink",
    "sparsify",
    "training",
    "zoo",
]
