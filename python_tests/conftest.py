"""Shared set-up: Triton's interpreter, a stub that lets timm import beside a CPU torch, seeds."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Read when triton is imported, by the first test that needs it; a GPU runs the kernels themselves.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The torchvision wheel of the same release wants operators from a library that the CPU build of
# torch does not have; their schemas are all that an import needs. Kept alive for the whole run.
if importlib.util.find_spec("torchvision") is not None:
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
