"""The packed weights of a model: by name, and in state dicts of the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from paikern._names import walk
from paikern.sparse._keys import dense_key
from paikern.sparse.packed_weight import PackedWeight


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Name in the unwrapped model -> packed weight, every name of a tied one."""
    return {
        path: module for (path, _), module, _ in walk(model) if isinstance(module, PackedWeight)
    }


def pack_keys(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of the dense model as one that `model`, with packed weights, can load.

    Args:
        model: has packed weights somewhere.
        state_dict: may hold a dense weight for each of them, see `dense_keys`.

    Returns:
        A copy in which each such weight has become the values that the model keeps and its mask.
        What the dense weight holds elsewhere is dropped.

    Raises:
        ValueError: a dense weight of another shape, or positions without content (meta device).

    Example:
        >>> import torch
        >>> net = torch.nn.Module()
        >>> net.weight = PackedWeight.from_dense(torch.ones(1, 2), torch.tensor([[True, False]]))
        >>> net.load_state_dict(pack_keys(net, {"weight": torch.tensor([[5.0, 6.0]])}))
        <All keys matched successfully>
        >>> net.weight.to_dense().tolist()
        [[5.0, 0.0]]
    """
    found = dict(state_dict)
    for name, module in model.named_modules():
        key = dense_key(name + "." if name else "")
        if not isinstance(module, PackedWeight) or key not in found:
            continue
        dense = found.pop(key)
        if not isinstance(dense, Tensor):
            raise ValueError(f"pack_keys: {key} must be a tensor, got {type(dense).__name__}")
        if module.positions.is_meta:
            raise ValueError(
                f"pack_keys: the positions of {key} are on the meta device and have no content; "
                f"load {key}.values and {key}.mask"
            )
        if dense.shape != module.shape:
            raise ValueError(
                f"pack_keys: {key} has shape {tuple(dense.shape)} in the state dict, "
                f"{tuple(module.shape)} in the model"
            )
        prefix = name + "." if name else ""
        found[prefix + "mask"] = module.packed_mask()
        found[prefix + "values"] = module.gather(dense.detach().to(module.device))
    return found
