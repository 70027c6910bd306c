"""Path graphs: from a model to the linear network in which its paths are counted."""

from paikern.pathgraph.flow import Flow, Semantics, Visit
from paikern.pathgraph.graph import PathGraph
from paikern.pathgraph.program import Program, compiled
from paikern.pathgraph.rules import register_path_rule
from paikern.pathgraph.shift_invariant import shift_invariant
from paikern.pathgraph.trace import trace

__all__ = [
    "Flow",
    "PathGraph",
    "Program",
    "Semantics",
    "Visit",
    "compiled",
    "register_path_rule",
    "shift_invariant",
    "trace",
]
