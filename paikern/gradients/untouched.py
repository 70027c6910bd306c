"""A model can be run in any mode, with any randomness, and nothing of it shows afterwards."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

MODES = ("train", "eval")


@contextlib.contextmanager
def untouched(model: nn.Module, mode: str, seed: int) -> Iterator[None]:
    """Run `model` in `mode` from `seed`; afterwards everything is as it was, also after an error.

    Inside, modules hold copies of their buffers (batch-norm statistics), so that the buffers
    themselves are never written to. Put back are the train or eval mode of every module, tensors
    that modules keep as plain attributes, and the random states of PyTorch (CPU and the model's
    GPUs), NumPy and Python. Parameters and their `.grad` are not copied: whoever runs inside must
    not write to them.

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
    modules = list(model.modules())
    training = [module.training for module in modules]
    buffers = [dict(module._buffers) for module in modules]
    attributes = [_tensors(module) for module in modules]
    try:
        with own_randomness(model, seed), torch.inference_mode(False):
            _copy_buffers(modules)
            model.train(mode == "train")
            yield
    finally:
        for module, mode_before, held, kept in zip(
            modules, training, buffers, attributes, strict=True
        ):
            module.training = mode_before
            module._buffers.clear()
            module._buffers.update(held)
            for key in _tensors(module).keys() - kept.keys():  # they would keep a graph alive
                del vars(module)[key]
            vars(module).update(kept)


@contextlib.contextmanager
def own_randomness(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside, a loader's that shuffles among them; afterwards as before.

    Seeded and put back are the random states of PyTorch (CPU and the model's GPUs), NumPy and
    Python.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> state = torch.get_rng_state()
        >>> with own_randomness(layer, seed=0):
        ...     _ = torch.rand(5)
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    gpus = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=gpus):
            _seed(seed, gpus)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Tensors beside parameters and buffers, such as the weight that torch's pruning hook makes."""
    return {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}


def _copy_buffers(modules: list[nn.Module]) -> None:
    copies: dict[int, Tensor] = {}  # a buffer that two modules share stays shared
    for module in modules:
        for key, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[key] = copies[id(buffer)]


def _seed(seed: int, gpus: list[int]) -> None:
    # Not torch.manual_seed: it would seed GPUs as well whose states are not put back.
    torch.default_generator.manual_seed(seed)
    for index in gpus:
        torch.cuda.default_generators[index].manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
