"""Lets transformers import beside a torchvision whose native library wants CUDA."""

from __future__ import annotations

import torch

_keep_alive: list[torch.library.Library] = []

if not hasattr(torch.ops.torchvision, "nms"):
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)
