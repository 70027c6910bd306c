"""Path counting by CUDA (csrc/cuda/path*.cuh), and how much room and how many blocks it takes.

`workspace` says it for every caller: the operations here start one kernel each, and a program that
goes through the layers of a network in one kernel sets the room of its largest product aside.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paikern.backends.cuda_launch import Step, run
from paikern.backends.cuda_layers import TYPES, one_vector
from paikern.backends.errors import refuse_nan
from paikern.errors import BackendError

__all__ = [
    "Workspace",
    "conv_geometry",
    "linear_geometry",
    "path_backward",
    "path_conv_backward",
    "path_conv_forward",
    "path_conv_score",
    "path_forward",
    "path_score",
    "path_sweep",
    "workspace",
]

# As in path_vector.cuh and path_maps.cuh, whose words for them these are.
_BAND, _PARTS, _SHORTEST, _FLAT = 32, 4096, 4, 1024
_HIGH, _DEPTH, _NARROW, _TILES, _LEAST = 64, 16, 16, 264, 8
_LARGEST = 2**30  # numbers that the kernels hold in 32 bits stay below

Geometry = tuple[int, ...]
"""The 22 numbers of a product: batch, rows, channels, groups, then size, kernel, stride, padding,
dilation and out with three axes each."""


class Workspace(NamedTuple):
    """What a product wants: room for partial sums, zeroed counters, and blocks at most."""

    floats: int
    counters: int
    blocks: int


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _cut(steps: int, others: int, most: int, shortest: int) -> int:
    """Into how many parts `steps` are cut, see pk_cut."""
    if steps == 0:
        return 1
    wanted = min(_ceil(steps, shortest), _ceil(most, others))
    return _ceil(steps, _ceil(steps, wanted))


@functools.lru_cache(maxsize=4096)
def workspace(direction: str, geometry: Geometry, dtype: torch.dtype, power: int) -> Workspace:
    """What the product takes in one direction: "forward", "adjoint" (path_sweep too) or "score".

    Args:
        dtype: of the weight; power 0 reads none and is cut like a type of two bytes.
    """
    rows, channels = geometry[1], geometry[2]
    if one_vector(geometry):
        if direction == "score":
            return Workspace(0, 0, _ceil(rows * channels, _FLAT))
        step = 128 if dtype == torch.float32 and power else 256
        bands, strips = _ceil(rows, _BAND), _ceil(channels, step)
        if direction == "forward":
            steps, others, width = strips, bands, rows
        else:
            steps, others, width = bands, strips, strips * step
        parts = _cut(steps, others, _PARTS, _SHORTEST)
        floats = parts * width if parts > 1 else 0
        return Workspace(floats, others * _counters(parts), parts * others)
    batch, groups = geometry[0], geometry[3]
    size, kernel, stride = geometry[4:7], geometry[7:10], geometry[10:13]
    dilation, out = geometry[16:19], geometry[19:22]
    depth, phases = channels // groups * math.prod(kernel), 1
    m, n, deep = rows // groups, batch * math.prod(out), depth
    if direction == "score":
        n, deep = deep, n
    elif direction == "adjoint":
        steps_of = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
        hits = math.prod(_ceil(k, s) for k, s in zip(kernel, steps_of, strict=True))
        box = math.prod(_ceil(a, s) for a, s in zip(size, stride, strict=True))
        m, n, deep = channels // groups, batch * box, rows // groups * hits
        phases = math.prod(stride)
    wide = _NARROW if n <= _NARROW else _HIGH
    tiles = _ceil(m, _HIGH) * _ceil(n, wide) * phases * groups
    parts = _cut(_ceil(deep, _DEPTH), tiles, _TILES, _LEAST)
    floats = tiles * parts * _HIGH * wide if parts > 1 else 0
    return Workspace(floats, tiles * _counters(parts), tiles * parts)


def _counters(parts: int) -> int:
    """Of one sum of so many parts, which are added in sets, see pk_set."""
    size = 8
    while parts > size * 8 and size * size < parts:
        size *= 2
    return 1 + _ceil(parts, size) if parts > 1 else 0


def linear_geometry(batch: int, rows: int, columns: int) -> Geometry:
    """Of a matrix and a batch of vectors: one position, kernel 1."""
    return _checked((batch, rows, columns, 1, *(1,) * 9, *(0,) * 3, *(1,) * 6))


def _checked(geometry: Geometry) -> Geometry:
    batch, rows, channels = geometry[:3]
    taps = math.prod(geometry[7:10])
    # The adjoint pads maps to multiples of the strides.
    padded = math.prod(n + s for n, s in zip(geometry[4:7], geometry[10:13], strict=True))
    places = max(padded, math.prod(geometry[19:22]))
    if max(batch * places, rows * taps, channels * taps) >= _LARGEST:
        raise BackendError(
            "the cuda backend takes rows, channels and positions of fewer than 2**30 numbers, got "
            f"{geometry}; use backend='reference'"
        )
    return geometry


@functools.lru_cache(maxsize=4096)
def _on_device(geometry: Geometry, device: torch.device) -> Tensor:
    return torch.tensor(geometry, dtype=torch.int64, device=device)


def as_map(tensor: Tensor) -> Tensor:
    """As the kernels read maps: float32, from a multiple of 16 bytes on."""
    held = tensor.detach().to(torch.float32).contiguous()
    return held.clone() if held.data_ptr() % 16 else held


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


class _Product:
    """The first arguments of a kernel (PaikernProduct), and the tensors that they point at."""

    def __init__(
        self, direction: str, geometry: Geometry, weight: Tensor, power: int, mask: Tensor | None,
        x: Tensor, g: Tensor,
    ) -> None:  # fmt: skip
        room = workspace(direction, geometry, weight.dtype, power)
        device = x.device
        self.blocks = room.blocks
        self.shape = (geometry, weight.dtype, power)
        self.weight = weight.detach().contiguous() if power else None
        self.mask = None if mask is None else mask.contiguous()
        self.geometry = _on_device(geometry, device)
        self.x, self.g = x, g
        self.partial = torch.empty(room.floats, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(room.counters, dtype=torch.int32, device=device)
        self.arguments = (
            _address(self.weight), TYPES.get(weight.dtype, 0), power, _address(self.mask), 0,
            self.geometry.data_ptr(), x.data_ptr(), g.data_ptr(), 0, 0, 0, _address(self.partial),
            _address(self.arrived), 0, 0,
        )  # fmt: skip

    def run(self, name: str, *more: int | float) -> None:
        started = kernel(name, *self.shape)
        run(self.geometry, [Step(started, self.blocks, (*self.arguments, *more))])


def kernel(name: str, geometry: Geometry, dtype: torch.dtype, power: int) -> str:
    """The kernel of "forward", "backward", "sweep" or "score"."""
    if not one_vector(geometry):
        return f"paikern_path_conv_{name}"
    if name in ("backward", "sweep"):
        return f"paikern_path_{name}_{32 if dtype == torch.float32 and power else 16}"
    return f"paikern_path_{name}"


def _forward(
    geometry: Geometry, weight: Tensor, x: Tensor, power: int, mask: Tensor | None, z: Tensor
) -> Tensor:
    if z.numel() == 0 or x.numel() == 0:
        return z.zero_()
    product = _Product("forward", geometry, weight, power, mask, as_map(x), z)
    product.run("forward")
    return z


def _backward(
    geometry: Geometry, weight: Tensor, g: Tensor, power: int, mask: Tensor | None, x: Tensor
) -> Tensor:
    if x.numel() == 0 or g.numel() == 0:
        return x.zero_()
    product = _Product("adjoint", geometry, weight, power, mask, x, as_map(g))
    product.run("backward")
    return x


def _score(
    geometry: Geometry, weight: Tensor, x: Tensor, g: Tensor, power: int, mask: Tensor | None,
    pruned: float,
) -> Tensor:  # fmt: skip
    score = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    if score.numel():
        product = _Product("score", geometry, weight, power, mask, as_map(x), as_map(g))
        product.run("score", float(pruned), score.data_ptr())
    return score


def _batch(t: Tensor) -> int:
    return 1 if t.dim() == 1 else t.shape[0]


def path_forward(weight: Tensor, x: Tensor, power: int, mask: Tensor | None) -> Tensor:
    z = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)
    return _forward(linear_geometry(_batch(x), *weight.shape), weight, x, power, mask, z)


def path_backward(weight: Tensor, g: Tensor, power: int, mask: Tensor | None) -> Tensor:
    x = g.new_empty((*g.shape[:-1], weight.shape[1]), dtype=torch.float32)
    return _backward(linear_geometry(_batch(g), *weight.shape), weight, g, power, mask, x)


def path_score(
    weight: Tensor, x: Tensor, g: Tensor, power: int, mask: Tensor | None, pruned: float
) -> Tensor:
    return _score(linear_geometry(_batch(x), *weight.shape), weight, x, g, power, mask, pruned)


def path_sweep(
    weight: Tensor, a: Tensor, g: Tensor, threshold: float, power: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    numel, columns = weight.numel(), weight.shape[1]
    x = g.new_empty(columns, dtype=torch.float32)
    # Rows that do not begin at bytes are joined by atomics on words.
    words = (torch.zeros if columns % 8 else torch.empty)(
        _ceil(numel, 32), dtype=torch.int32, device=weight.device
    )
    bits = words.view(torch.uint8)[: _ceil(numel, 8)]
    found = torch.zeros(2, dtype=torch.int64, device=weight.device)
    if numel == 0:
        return x.zero_(), bits, found[0]
    left = as_map(a)
    product = _Product(
        "adjoint", linear_geometry(1, *weight.shape), weight, power, mask, x, as_map(g)
    )
    more = (left.data_ptr(), floor32(threshold), words.data_ptr(), found.data_ptr())
    product.run("sweep", *more)
    refuse_nan("path_sweep", 0 if int(found[1]) else -1)
    return x, bits, found[0]


def floor32(value: float) -> float:
    """The largest float32 that is not above: float32 scores are above both or neither."""
    near = ctypes.c_float(value).value
    if near <= value:
        return near
    if math.isinf(near):
        return 3.4028234663852886e38
    word = ctypes.c_int32.from_buffer(ctypes.c_float(near))
    if near == 0.0:
        return -1.401298464324817e-45
    word.value += -1 if near > 0 else 1
    return ctypes.c_float.from_buffer(word).value


@functools.lru_cache(maxsize=4096)
def conv_geometry(
    weight: tuple[int, ...],
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Geometry, tuple[int, ...]]:
    """Of a convolution of maps of `size`, and the size of what comes out."""
    kernel = weight[2:]
    axes = zip(size[2:], kernel, stride, padding, dilation, strict=True)
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
    parts = ((size[2:], 1), (kernel, 1), (stride, 1), (padding, 0), (dilation, 1), (out, 1))
    spatial = (n for values, fill in parts for n in (*(fill,) * (3 - len(out)), *values))
    geometry = _checked((size[0], weight[0], size[1], groups, *spatial))
    return geometry, (size[0], weight[0], *out)


def _convolution(
    weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> tuple[Geometry, tuple[int, ...]]:  # fmt: skip
    shapes = (tuple(weight.shape), tuple(size), tuple(stride), tuple(padding), tuple(dilation))
    return conv_geometry(*shapes, groups)


def path_conv_forward(
    weight: Tensor,
    x: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    geometry, out = _convolution(weight, x.shape, stride, padding, dilation, groups)
    z = x.new_empty(out, dtype=torch.float32)
    return _forward(geometry, weight, x, power, mask, z)


def path_conv_backward(
    weight: Tensor,
    g: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
) -> Tensor:
    x = g.new_empty(tuple(input_size), dtype=torch.float32)
    geometry, _ = _convolution(weight, input_size, stride, padding, dilation, groups)
    return _backward(geometry, weight, g, power, mask, x)


def path_conv_score(
    weight: Tensor,
    x: Tensor,
    g: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    power: int,
    mask: Tensor | None,
    pruned: float,
) -> Tensor:
    geometry, _ = _convolution(weight, x.shape, stride, padding, dilation, groups)
    return _score(geometry, weight, x, g, power, mask, pruned)
