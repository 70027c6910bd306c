"""Exact selection by CUDA: the tables, the workspace and the launches (csrc/cuda/select.cuh).

A `SelectionPlan` is made once for tensors at fixed addresses; `launch` is then the same few
launches every time, without a copy to the host, so that a CUDA graph can hold a whole loop. The
counts and the exponents it reads lie in device memory and may change between launches.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from paikern.backends import cuda_launch, reference
from paikern.backends.cuda_launch import Step
from paikern.backends.cuda_layers import Layer, dense, factored, product
from paikern.backends.errors import refuse_nan

__all__ = [
    "SelectionPlan",
    "kth_largest",
    "topk_mask",
    "topk_mask_factored",
    "topk_mask_product",
]

TILE, BINS, DIGIT = 8192, 2048, 11  # select.cuh
_STATE, _RANKING, _LAYER, _GEOMETRY, _PLAN = 16, 8, 16, 22, 22  # numbers in a row
_KTH = 9  # where a state holds the k-th key
_SAMPLE, _BAND_THREADS = 16_384, 1024
_BLOCKS_EACH = 4  # blocks of 256 threads that a multiprocessor holds
_NO_NAN = 2**63 - 1


class SelectionPlan:
    """The k highest scores of all layers together (one k), or of each (one for every layer).

    Args:
        layers: from `cuda_layers`; their tensors stay alive with the plan. At least one.
        k: counts, or an int64 tensor of them on the device.
        exponents: one for each layer, or an int64 tensor of them on the device, read at every
            launch; at most 1,000,000 apart. Empty where they do not matter.
        emit: write masks; else only the k-th key is found.
        stream: from `new_stream`, shared by the plans of all rounds of a run, where sweeps meet
            the scores of layers that have an `inside` (select_stream.cuh); `forecast` comes before
            those. One ranking over several layers.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        k: Sequence[int] | Tensor,
        exponents: Sequence[int] | Tensor = (),
        emit: bool = True,
        stream: Tensor | None = None,
    ) -> None:
        self.layers = list(layers)
        like = self.layers[0].data
        self.like = like
        rankings = len(k)
        shared = rankings == 1 and len(self.layers) > 1
        self.width = _width(exponents) if shared else 32

        first, tile, starts = 0, 0, []
        for layer in self.layers:
            starts.append((first, tile))
            first += layer.data.numel()
            tile += -(-layer.data.numel() // TILE)
        starts.append((first, tile))
        self.tiles = tile
        self.blocks = min(tile, _BLOCKS_EACH * cuda_launch.multiprocessors(like)) if tile else 0

        ranges, room = [], 0
        for r in range(rankings):
            low, high = (0, len(self.layers)) if rankings == 1 else (r, r + 1)
            total = starts[high][0] - starts[low][0]
            capacity = min(total, max(_SAMPLE, total // 16))
            ranges.append((low, high, starts[low][1], starts[high][1], total, room, capacity, 0))
            room += capacity

        def words(count: int) -> Tensor:
            return like.new_empty(count, dtype=torch.int64)

        # Counters that are zero between launches, the states, and where NaN was found.
        self._states = like.new_zeros(rankings * (_STATE + BINS) + 1, dtype=torch.int64)
        self._tiles = words(3 * tile)
        self._parts = words(self.blocks + rankings)
        self._keys = like.new_empty(room, dtype=torch.int32)
        self._places = like.new_empty(room, dtype=torch.int16)
        self.k = k if isinstance(k, Tensor) else _upload(list(k), like)
        self.exponents = (
            exponents if isinstance(exponents, Tensor) else _upload(list(exponents) or [0], like)
        )
        rows: list[int] = []
        geometry = _PLAN
        self._tables = words(
            geometry + _GEOMETRY * len(self.layers) + _LAYER * len(self.layers)
            + _RANKING * rankings
        )  # fmt: skip
        base = self._tables.data_ptr()
        for layer in self.layers:
            rows += layer.geometry or (0,) * _GEOMETRY
        layer_at = geometry + len(rows)
        for index, (layer, (at, its_tile)) in enumerate(zip(self.layers, starts[:-1], strict=True)):
            rows += layer.row(at, its_tile, base + 8 * (geometry + _GEOMETRY * index))
        ranking_at = geometry + len(rows)
        for row in ranges:
            rows += row
        states = self._states.data_ptr()
        plan = (
            base + 8 * layer_at,
            base + 8 * ranking_at,
            states,
            self.k.data_ptr(),
            self.exponents.data_ptr(),
            states + 8 * rankings * _STATE,
            self._keys.data_ptr(),
            self._places.data_ptr(),
            self._tiles.data_ptr(),
            self._tiles.data_ptr() + 8 * tile,
            self._tiles.data_ptr() + 16 * tile,
            self._parts.data_ptr(),
            states + 8 * rankings * (_STATE + BINS),
            len(self.layers),
            rankings,
            tile,
            self.width,
            int(emit),
            0 if stream is None else stream.data_ptr(),
        )
        self._tables.copy_(torch.tensor([*plan, *(0,) * (geometry - len(plan)), *rows]))
        self._states[-1] = _NO_NAN
        digits = -(-self.width // DIGIT)
        pointer = (base,)
        largest = max(row[4] for row in ranges)
        sampled = max(1, -(-min(largest, _SAMPLE) // cuda_launch.THREADS))
        filters = ("filter", "filter", "filter_factored", "filter_maps")
        filter_ = filters[max(layer.source for layer in layers)]
        passes = [filter_, *["digit"] * digits, *(["ties", "emit"] if emit else [])]
        self.address = base
        self._stream = stream
        self.steps = [
            Step("paikern_select_sample", rankings * sampled, pointer),
            Step("paikern_select_band", rankings, pointer, _BAND_THREADS),
            *(Step(f"paikern_select_{name}", self.blocks, pointer) for name in passes),
        ]
        if stream is not None:
            collect = Step("paikern_select_collect", self.blocks, pointer)
            observe = Step("paikern_select_observe", 1, pointer, 1)
            self.steps = [collect, *self.steps, observe]

    @property
    def bits(self) -> list[Tensor]:
        """The packed masks, one a layer."""
        return [layer.bits for layer in self.layers if layer.bits is not None]

    def forecast(self) -> None:
        """Before the sweeps: where the k-th score is expected."""
        if self._stream is not None and self.tiles:
            cuda_launch.run(self.like, [Step("paikern_select_forecast", 1, (self.address,), 1)])

    def launch(self) -> None:
        """Start the kernels; the masks are there when the stream has come to their end."""
        if self.tiles:
            cuda_launch.run(self.like, self.steps)

    def check(self, operation: str) -> None:
        """Raise if any launch has met NaN; waits for the stream, so once at the end."""
        refuse_nan(operation, self.nan_layer())

    def nan_layer(self) -> int:
        """The first layer in which any launch has met NaN, or -1; waits for the stream."""
        found = int(self._states[-1])
        return -1 if found == _NO_NAN else found

    def kth(self) -> float:
        """The k-th score of the first ranking; only where exponents do not matter."""
        key = int(self._states[_KTH])
        bits = key ^ 0x80000000 if key & 0x80000000 else ~key & 0xFFFFFFFF
        return struct.unpack("<f", struct.pack("<I", bits))[0]


def new_stream(like: Tensor) -> Tensor:
    """What rounds remember of each other (PaikernStream)."""
    return like.new_zeros(12, dtype=torch.int64)


def settled_rounds(stream: Tensor) -> int:
    """Rounds whose selection took no read of its own; waits for the device."""
    return int(stream[-1])


def _upload(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64).to(like.device)


def _width(exponents: Sequence[int] | Tensor) -> int:
    """Bits of a key: those of a float where exponents are equal, else room for the difference."""
    if isinstance(exponents, Tensor):
        reach = 1_000_000  # they may change
    else:
        reach = max(exponents, default=0) - min(exponents, default=0)
    return ((reach + 280) << 23).bit_length() + 1 if reach else 32


def _wide(scores: Sequence[Tensor]) -> bool:
    """Keys are those of float32; float64 scores are ranked by torch's sort, which is slow."""
    return any(s.dtype == torch.float64 for s in scores)


def _selected(operation: str, plan: SelectionPlan) -> list[Tensor]:
    plan.launch()
    plan.check(operation)
    return plan.bits


def topk_mask(
    scores: Sequence[Tensor],
    k: Sequence[int],
    exponents: Sequence[int],
    absolute: bool,
    masks: Sequence[Tensor],
    memory: Tensor | None,
) -> list[Tensor]:
    if _wide(scores):
        return reference.topk_mask(scores, k, exponents, absolute, masks, memory)
    plan = SelectionPlan(dense(scores, masks, absolute), k, exponents)
    bits = _selected("topk_mask", plan)
    return bits if memory is None else [*bits, memory.clone()]


def topk_mask_product(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    masks: Sequence[Tensor],
    k: Sequence[int],
) -> list[Tensor]:
    return _selected("topk_mask_product", SelectionPlan(product(weights, gradients, masks), k))


def topk_mask_factored(
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    masks: Sequence[Tensor],
    exponents: Sequence[int],
    k: Sequence[int],
    power: int,
    convs: Sequence[int],
) -> list[Tensor]:
    layers = factored(weights, a, g, masks, power, convs)
    return _selected("topk_mask_factored", SelectionPlan(layers, k, exponents))


def kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    if _wide(scores):
        return reference.kth_largest(scores, k)
    plan = SelectionPlan(dense(scores, (), False, emit=False), [k], emit=False)
    plan.launch()
    plan.check("kth_largest")
    return torch.tensor(plan.kth(), dtype=torch.float64)
