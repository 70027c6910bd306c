"""A stub that lets torchvision import beside a CPU torch, for tests and for examples alike."""

from __future__ import annotations

import importlib.util

import torch

# The torchvision wheel of the same release wants operators from a library that the CPU build of
# torch does not have; their schemas are all that an import needs. Kept alive for the whole run.
if importlib.util.find_spec("torchvision") is not None:
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
