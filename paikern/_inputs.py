"""What about inputs is likely not to fit a model that has refused them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_CHANNELS = (1, 3, 4)


def fix_for(model: nn.Module, inputs: Any) -> str:
    """How `inputs` have to be converted, as the end of a message; "" where nothing is known.

    Looked for are images of bytes or with their channels last, integers where the model has no
    embedding, floats where it has one, and floats of another dtype than the weights.

    Args:
        model: what has refused the inputs.
        inputs: tensors, in any container.

    Example:
        >>> fix_for(nn.Linear(3, 1), torch.zeros(2, 3, dtype=torch.int64))
        '; its inputs have to be floats, got torch.int64: x.float()'
    """
    given = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
    embeds = any(isinstance(module, nn.Embedding) for module in model.modules())
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    has_tokens = any(x.dtype in (torch.int32, torch.int64) for x in given)
    for x in given:
        if embeds and x.dim() <= 2:  # token numbers, or a mask beside some
            if not has_tokens:
                return f"; token numbers have to be integers, got {x.dtype}: x.long()"
        elif x.dtype == torch.uint8:
            return (
                "; bytes have to become the floats that it is trained on, such as x.float() / 255"
            )
        elif not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool:
            return f"; its inputs have to be floats, got {x.dtype}: x.float()"
        elif x.is_floating_point() and weights not in (None, x.dtype):
            return f"; its weights are {weights} and the inputs {x.dtype}: x.to({weights})"
        elif _has_channels_last(x) and any(isinstance(m, nn.Conv2d) for m in model.modules()):
            return (
                f"; images have to be [n, channels, height, width], got {list(x.shape)}: "
                "x.movedim(-1, 1)"
            )
    return ""


def _has_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[-1] in _CHANNELS and x.shape[1] not in _CHANNELS
