"""Shared by the tests of packed weights on the CUDA sources: which kernel, which backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from paikern.backends import cuda_masked_linear, registry
from python_tests.ops.masked_linear_cases import Case, check, make

__all__ = ["SHAPES", "Case", "checked", "kernel", "kernel_of", "make", "of", "of_backend"]
SHAPES = [(1, 1), (31, 33), (33, 31), (1, 300), (300, 1), (129, 130), (65, 300)]


@contextlib.contextmanager
def kernel_of(name: str) -> Iterator[None]:
    """All products by this kernel, "index", "decode" or "dense"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_masked_linear, "choose", lambda *arguments: name)
        yield


@contextlib.contextmanager
def kernel(name: str) -> Iterator[None]:
    """The same, within "cuda_source"."""
    with kernel_of(name), registry.using("cuda_source"):
        yield


def checked(name: str, case: Case, x: Tensor, *, bias: bool = True) -> None:
    """Forward and all gradients by one kernel, against float64."""
    with kernel(name):
        check(case, x, bias=bias)


def of_backend(
    case: Case, x: Tensor, g: Tensor, operations: Any = cuda_masked_linear
) -> list[Tensor]:
    """The three products, past the choice of a backend."""
    where, values = case.packed.where(transposed=True), case.packed.values.detach()
    return [
        operations.masked_linear(x, values, case.bias, *where),
        operations.masked_linear_input(g, values, *where),
        operations.masked_linear_kept(g, x, *where),
    ]


def of(case: Case, x: Tensor, g: Tensor) -> list[Tensor]:
    return of_backend(case, x, g, torch.ops.paikern)
