"""Products with packed weights on a GPU, against the library's product with a weight masked before.

PyTorch's product on a GPU is that of cuBLAS. Both formats at every point: which kernel runs is what
the backend chooses. Forward, and from some hundred rows of x on what training adds: the gradient of
x and that of the kept values, where the library makes a dense one. The floor is one read of the
packed weight and of x and one write of y, at the speed of a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import paikern as pk
from bench.gpu_clock import Clock, Contender, Times, normal, rotated, turn
from bench.timing import Row
from paikern.backends import registry

FORMATS = ("bitmap", "index")
DTYPE = torch.bfloat16
_CLOSE = 0.02  # of the largest value: bfloat16 has eight bits, and sums differ in their order


class Sizes(NamedTuple):
    """What is measured; batches from `training` on backward too."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096))
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.9, 0.95, 0.99)
    batches: tuple[int, ...] = (1, 8, 16, 64, 512, 2048)
    training: int = 512


TINY = Sizes(((64, 96),), (0.5, 0.9), (1, 9), 9)


class Layer(NamedTuple):
    """A weight in all its forms."""

    dense: Tensor  # masked once
    packed: dict[str, pk.PackedWeight]


def layers(clock: Clock, shape: tuple[int, int], sparsity: float) -> list[Layer]:
    """As many as no cache holds when they are dense; packed ones lie between dense ones in time."""
    generator = torch.Generator(clock.device).manual_seed(0)

    def made() -> Layer:
        weight = torch.randn(shape, device=clock.device, generator=generator).to(DTYPE)
        mask = torch.rand(shape, device=clock.device, generator=generator) >= sparsity
        packed = {name: pk.PackedWeight.from_dense(weight, mask, format=name) for name in FORMATS}
        for weights in packed.values():
            weights.where(transposed=True)
        return Layer(weight * mask, packed)

    return rotated(made, shape[0] * shape[1] * DTYPE.itemsize)


def forward(x: Tensor, weight: pk.PackedWeight) -> Tensor:
    return pk.ops.masked_linear(x, weight)


def backward(x: Tensor, g: Tensor, weight: pk.PackedWeight) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the kept values."""
    operations, where = torch.ops.paikern, weight.where(transposed=True)
    values = weight.values.detach()
    by_x = operations.masked_linear_input(g, values, *where)
    return by_x, operations.masked_linear_kept(g, x, *where)


def moved(weight: pk.PackedWeight, batch: int, step: str) -> int:
    """The fewest bytes: values and positions once, x and y once; backward twice, values written."""
    rows, columns = weight.shape
    size = weight.dtype.itemsize
    held = weight.nnz * size + weight.positions.numel() * weight.positions.element_size()
    vectors = batch * (rows + columns) * size
    return held + vectors if step == "forward" else 2 * held + 2 * vectors


def point(
    clock: Clock,
    backends: list[str],
    shape: tuple[int, int],
    sparsity: float,
    sizes: Sizes,
    bandwidth: float,
) -> Iterator[Row]:
    """Every batch, format and backend with weights of one size and sparsity."""
    weights = layers(clock, shape, sparsity)
    rows, columns = shape
    for batch in sizes.batches:
        x = normal((batch, columns), DTYPE, clock.device, 1)
        g = normal((batch, rows), DTYPE, clock.device, 2)
        calls: dict[str, tuple[Callable[[Layer], object], Callable[..., object]]] = {
            "forward": (
                lambda layer, x=x: x @ layer.dense.T,
                lambda weight, x=x: forward(x, weight),
            ),
            "backward": (
                lambda layer, x=x, g=g: (g @ layer.dense, g.T @ x),
                lambda weight, x=x, g=g: backward(x, g, weight),
            ),
        }
        for step in calls if batch >= sizes.training else ("forward",):
            plain, ours = calls[step]
            contenders: dict[str, Contender] = {
                "torch": lambda i, plain=plain: plain(turn(weights, i)),
                **{
                    f"{backend} {name}": _forced(backend, name, ours, weights)
                    for backend in backends
                    for name in FORMATS
                },
            }
            with torch.no_grad():
                close = all(
                    _close(contenders[who](0), weights[0], x, g, step) for who in contenders
                )
                found = clock.times(contenders)
            for who in list(contenders)[1:]:
                backend, name = who.split()
                nbytes = moved(weights[0].packed[name], batch, step)
                what = {
                    "kernel": f"{step}, {name}",
                    "backend": backend,
                    "size": f"{rows}x{columns}, {sparsity:.0%} pruned, batch {batch}",
                    "shape": list(shape),
                    "batch": batch,
                    "dtype": str(DTYPE).removeprefix("torch."),
                    "sparsity": sparsity,
                }
                yield {
                    "op": "masked_linear",
                    **what,
                    **_columns(found[who], found["torch"], nbytes, bandwidth),
                    "library": "cuBLAS" if clock.on_gpu else "CPU",
                    "close": close,
                }


def _forced(
    backend: str, name: str, ours: Callable[..., object], weights: list[Layer]
) -> Contender:
    def call(index: int) -> object:
        with registry.using(backend):
            return ours(turn(weights, index).packed[name])

    return call


def _close(found: object, layer: Layer, x: Tensor, g: Tensor, step: str) -> bool:
    """Whether a product is that of the dense weight, in float32, up to the rounding of its type."""
    dense, wide = layer.dense.float(), x.float()
    if step == "forward":
        pairs = [(found, wide @ dense.T)]
    else:
        by_x, by_values = found  # type: ignore[misc]
        gradient = g.float().T @ wide
        kept = pk.ops.unpack_mask(layer.packed["index"].packed_mask(), dense.shape)
        same = gradient if by_values.dim() == 2 else gradient[kept]
        pairs = [(by_x, g.float() @ dense), (by_values, same)]
    return all(
        float((one.float() - other).abs().max()) <= _CLOSE * float(other.abs().max())  # type: ignore[attr-defined]
        for one, other in pairs
    )


def _columns(ours: Times, theirs: Times, nbytes: int, bandwidth: float) -> Row:
    return {
        "bytes": nbytes,
        "floor_seconds": nbytes / bandwidth,
        "seconds": ours.seconds,
        "spread": ours.spread,
        "reference": "torch",
        "reference_seconds": theirs.seconds,
        "ratio": theirs.seconds / ours.seconds,
        "bandwidth_fraction": nbytes / ours.seconds / bandwidth,
    }
