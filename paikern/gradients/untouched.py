"""A model can be run in any mode, with any randomness, and nothing of it shows afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

MODES = ("train", "eval")


@contextlib.contextmanager
def untouched(model: nn.Module, mode: str, seed: int) -> Iterator[None]:
    """Run `model` in `mode` from `seed`; afterwards everything is as it was, also after an error.

    Put back are the train or eval mode of every module, all buffers (batch-norm statistics), and
    the random states of PyTorch (CPU and the model's GPUs), NumPy and Python. Parameters and their
    `.grad` are not saved: whoever runs inside must not write to them.

    Args:
        model: the model to run.
        mode: "train" or "eval".
        seed: of dropout and whatever else is random inside.

    Raises:
        ValueError: another mode.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(3).eval()
        >>> with untouched(norm, "train", seed=0):
        ...     _ = norm(torch.randn(8, 3))
        >>> norm.training, norm.running_mean.tolist()
        (False, [0.0, 0.0, 0.0])
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    training = {module: module.training for module in model.modules()}
    buffers = {name: (b, b.detach().clone()) for name, b in model.named_buffers()}
    gpus = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            model.train(mode == "train")
            yield
    finally:
        for module, was in training.items():
            module.training = was
        with torch.no_grad():
            now = dict(model.named_buffers())
            for name, (buffer, value) in buffers.items():
                # A module may put a new tensor in the place of its buffer.
                if now.get(name) is not buffer:
                    owner, _, key = name.rpartition(".")
                    model.get_submodule(owner)._buffers[key] = buffer
                buffer.copy_(value)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
