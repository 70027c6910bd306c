"""What each ATen operation means for a path. Importing this package fills the table.

A family a file: `elementwise` (activations, norms, sums, products), `products` (weights,
attention), `pools` (and whatever is replayed as it is), `views`.
"""

from paikern.pathgraph.rules import attention, elementwise, pools, products, views
from paikern.pathgraph.rules.elementwise import COPIES
from paikern.pathgraph.rules.table import RULES, apply, is_value, op_name, register_path_rule
from paikern.pathgraph.rules.views import slice_range

__all__ = [
    "COPIES",
    "RULES",
    "apply",
    "attention",
    "elementwise",
    "is_value",
    "op_name",
    "pools",
    "products",
    "register_path_rule",
    "slice_range",
    "views",
]
