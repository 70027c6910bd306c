"""The sweeps of one large linear layer against a read of its bytes and against PyTorch.

`W` is `[8192, 8192]`: 268 MB in float32, more than the caches hold. paikern's operation and one
contender at a time run in turn (`bench/selection_contenders.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.references import path_layer
from bench.references.nth_element import read_bytes
from bench.selection_contenders import OURS, READ, SUM, Contender, measure
from bench.timing import Row
from paikern import ops

SEED = 0
SIDE, QUICK_SIDE = 8192, 1024
MASKED = 0.9  # fraction removed by the mask of the masked case
KEPT = 0.1  # of the weights that score above the threshold of the fused sweep
ABS, PLAIN, COMPOSITION = "torch |W|", "torch W", "torch composition"
FLOORS = (READ, SUM)
#: dtype, fraction removed by the mask.
CASES = ((torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float32, MASKED))


class Layer(NamedTuple):
    """One weight, its mask packed and as PyTorch multiplies it, and the vectors of both sides."""

    weight: Tensor  # [out, in]
    packed: Tensor | None
    floats: Tensor | None  # 0.0 and 1.0, dtype of the weight
    x: Tensor  # [in]
    g: Tensor  # [out]
    removed: float

    @property
    def stored(self) -> list[Tensor]:
        """What has to be read at least."""
        return [self.weight, *([] if self.packed is None else [self.packed])]


def make_layer(side: int, dtype: torch.dtype, removed: float, seed: int = SEED) -> Layer:
    """A normal weight `[side, side]`, positive vectors and, if something is removed, a mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(side, side, generator=generator).to(dtype)
    x, g = (torch.rand(side, generator=generator) + 0.5 for _ in range(2))
    if not removed:
        return Layer(weight, None, None, x, g, removed)
    kept = torch.rand(side, side, generator=generator) >= removed
    return Layer(weight, ops.pack_mask(kept), kept.to(dtype), x, g, removed)


def threshold_of(layer: Layer, kept: float = KEPT) -> float:
    """What `kept` of the scores that are not masked exceed, by a sample of 128 rows or so.

    It lies between two scores, so that rounding does not decide which side one is on.
    """
    every = max(1, layer.weight.shape[0] // 128)
    scores = layer.weight[::every].float().abs() * layer.x * layer.g[::every, None]
    if layer.floats is not None:
        scores = scores[layer.floats[::every] > 0]
    values = scores.flatten().sort().values
    middle = int((1 - kept) * (values.numel() - 1))
    return float(values[middle : middle + 2].mean())


def reads(layer: Layer, threads: int) -> dict[str, Contender]:
    """Reading the weight and its mask once, natively and by torch."""
    return {
        READ: Contender(lambda: [read_bytes(tensor, threads) for tensor in layer.stored]),
        SUM: Contender(lambda: [tensor.sum() for tensor in layer.stored]),
    }


def contenders(layer: Layer, threads: int) -> Iterator[tuple[str, dict[str, Contender]]]:
    """Operation name -> paikern and its contenders. PyTorch has a float mask, paikern has bits."""
    weight, packed, floats, x, g, _ = layer
    plain_x, plain_g = x.to(weight.dtype), g.to(weight.dtype)
    threshold = threshold_of(layer)
    actions: dict[str, dict[str, Callable[[], object]]] = {
        "path_forward": {
            OURS: lambda: ops.path_forward(weight, x, mask=packed),
            ABS: lambda: path_layer.forward(weight, x, floats),
            PLAIN: lambda: weight @ plain_x,
        },
        "path_backward": {
            OURS: lambda: ops.path_backward(weight, g, mask=packed),
            ABS: lambda: path_layer.backward(weight, g, floats),
            PLAIN: lambda: plain_g @ weight,
        },
        "path_sweep": {
            OURS: lambda: ops.path_sweep(weight, x, g, threshold, mask=packed),
            COMPOSITION: lambda: path_layer.sweep(weight, x, g, threshold, floats),
        },
    }
    for name, held in actions.items():
        made = {who: Contender(action) for who, action in held.items()}
        yield name, made | reads(layer, threads)


def rows_of(op: str, layer: Layer, threads: int, pairs: Mapping[str, Any]) -> list[Row]:
    """Rows of the results: one for each contender."""
    side = layer.weight.shape[0]
    return [
        {
            "section": "sweeps",
            "op": op,
            "size": f"{side} x {side}",
            "dtype": str(layer.weight.dtype).removeprefix("torch."),
            "sparsity": layer.removed,
            "threads": threads,
            "reference": name,
            "seconds": ours.seconds,
            "reference_seconds": other.seconds,
            "ratio": other.seconds / ours.seconds,
            "samples": ours.samples,
            "reference_samples": other.samples,
            "bytes": sum(tensor.nbytes for tensor in layer.stored),
        }
        for name, (ours, other) in pairs.items()
    ]


def run(threads: Sequence[int], quick: bool) -> list[Row]:
    """All operations, dtypes, masks and numbers of threads."""
    rows: list[Row] = []
    for dtype, removed in CASES:
        layer = make_layer(QUICK_SIDE if quick else SIDE, dtype, removed)
        for count in threads:
            torch.set_num_threads(count)
            for op, held in contenders(layer, count):
                rows += rows_of(op, layer, count, measure(held, spent=0.1 if quick else 0.6))
    return rows
