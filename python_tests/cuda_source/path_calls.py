"""Running one call on the CUDA sources and on another backend, on any number of blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from paikern.backends import cuda_path, registry
from paikern.backends.cuda_launch import Provider, provided
from python_tests.ops.path_cases import TOLERANCE, error

T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POWERS = ((0, True), (0, False), (1, False), (1, True), (2, True))


def on(backend: str, call: Callable[[], T]) -> T:
    with registry.using(backend):
        return call()


def both(call: Callable[[], T], other: str = "reference") -> tuple[T, T]:
    """What the CUDA sources and another backend find."""
    return on("cuda_source", call), on(other, call)


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    assert error(found, wanted.double()) <= TOLERANCE


@contextlib.contextmanager
def on_blocks(count: int) -> Iterator[None]:
    """Every product on so many blocks, whatever it asks for."""
    with pytest.MonkeyPatch.context() as patch:
        plan = cuda_path.workspace
        patch.setattr(cuda_path, "workspace", lambda *args: plan(*args)._replace(blocks=count))
        yield


def same_on_all_blocks(call: Callable[[], T], counts: tuple[int, ...] = (1, 3, 7)) -> T:
    """The result, the same bits from run to run and for every number of blocks."""

    def tensors(result: object) -> list[Tensor]:
        return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]

    first = on("cuda_source", call)
    others = [on("cuda_source", call)]
    for count in counts:
        with on_blocks(count):
            others.append(on("cuda_source", call))
    for other in others:
        assert all(map(torch.equal, tensors(first), tensors(other)))
    return first


def scale_of(values: Tensor | None) -> Tensor:
    """PaikernScale: the bits of the largest value, and an exponent."""
    bits = 0 if values is None else int(values.max().view(torch.int32))
    return torch.tensor([bits, 0])


def largest(scale: Tensor) -> float:
    return float(scale[0].to(torch.int32).view(torch.float32))


def run_product(
    direction: str,
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    x_scale: Tensor | None,
    g_scale: Tensor | None,
    top: Tensor | None,
    counts: int,
    provider: Provider,
    *score: Tensor,
    mask: Tensor | None = None,
    first_bit: int = 0,
) -> None:
    """One product with all that PaikernProduct can say; x or g is written."""
    geometry = cuda_path.linear_geometry(x.shape[0], *weight.shape)
    product = cuda_path._Product(direction, geometry, weight, 1, mask, x, g)
    scales = (0 if s is None else s.data_ptr() for s in (x_scale, g_scale, top))
    head, tail = product.arguments[:4], product.arguments[11:13]
    product.arguments = (*head, first_bit, *product.arguments[5:8], *scales, *tail, counts, 0)
    name = {"forward": "forward", "adjoint": "backward", "score": "score"}[direction]
    more = (0.0, score[0].data_ptr()) if score else ()
    with provided(provider):
        product.run(name, *more)
