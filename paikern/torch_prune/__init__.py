"""`torch.nn.utils.prune` on packed masks: the same names, arguments and state, less memory.

Replace `import torch.nn.utils.prune as prune` by `import paikern.torch_prune as prune`; what
differs is listed in docs/torch_prune.md.

Example:
    >>> import torch
    >>> import paikern.torch_prune as prune
    >>> layer = prune.l1_unstructured(torch.nn.Linear(4, 2), "weight", amount=0.5)
    >>> int(layer.weight_mask.sum()), sorted(layer.state_dict())
    (4, ['bias', 'weight_mask', 'weight_orig'])
    >>> layer = prune.remove(layer, "weight")
    >>> sorted(layer.state_dict())
    ['bias', 'weight']
"""

from paikern.torch_prune.amounts import (
    _compute_norm,
    _compute_nparams_toprune,
    _validate_pruning_amount,
    _validate_pruning_amount_init,
    _validate_pruning_dim,
    _validate_structured_pruning,
)
from paikern.torch_prune.base import BasePruningMethod, PruningContainer
from paikern.torch_prune.functional import (
    custom_from_mask,
    global_unstructured,
    identity,
    is_pruned,
    l1_unstructured,
    ln_structured,
    random_structured,
    random_unstructured,
    remove,
)
from paikern.torch_prune.methods import (
    CustomFromMask,
    Identity,
    L1Unstructured,
    LnStructured,
    RandomStructured,
    RandomUnstructured,
)

__all__ = [
    "BasePruningMethod",
    "CustomFromMask",
    "Identity",
    "L1Unstructured",
    "LnStructured",
    "PruningContainer",
    "RandomStructured",
    "RandomUnstructured",
    "_compute_norm",
    "_compute_nparams_toprune",
    "_validate_pruning_amount",
    "_validate_pruning_amount_init",
    "_validate_pruning_dim",
    "_validate_structured_pruning",
    "custom_from_mask",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "random_structured",
    "random_unstructured",
    "remove",
]
