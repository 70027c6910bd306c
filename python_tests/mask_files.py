"""Masks whose files the tests write, read and damage."""

from __future__ import annotations

from typing import Any

import torch

from paikern.masks import MaskSet

METADATA = {"method": "dpai", "seed": 3, "sparsity": 0.75, "arguments": {"alpha": 0.99}}


def some_masks(seed: int = 0, **metadata: Any) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    layout = {"stem.weight": (4, 3, 3, 3), "odd": (7,), "empty": (0, 5), "head.weight": (5, 9)}
    masks = {n: torch.rand(s, generator=generator) < 0.25 for n, s in layout.items()}
    return MaskSet.from_bool(masks, {**METADATA, **metadata})
