"""The score tensors of the selection benchmark: distributions, and what is timed on them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.timing import Row

SEED = 0
SIZES = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)
KEEPS = (0.001, 0.01, 0.1, 0.5)
#: More than 2^31 scores, in float16 so that they fit beside a desktop's other programs.
BEYOND_INT32 = 2**31 + 1024

_CHUNK = 1 << 26


def _normal(part: Tensor, generator: torch.Generator) -> None:
    part.normal_(generator=generator).abs_()


def _heavy(part: Tensor, generator: torch.Generator) -> None:
    part.cauchy_(generator=generator).abs_()


def _lognormal(part: Tensor, generator: torch.Generator) -> None:
    part.log_normal_(0.0, 2.0, generator=generator)


def _levels(part: Tensor, generator: torch.Generator) -> None:
    part.random_(0, 256, generator=generator).div_(256)


def _equal(part: Tensor, generator: torch.Generator) -> None:
    del generator
    part.fill_(0.5)


def _zeros(part: Tensor, generator: torch.Generator) -> None:
    part.normal_(generator=generator).abs_()
    part.sub_(1.959964).clamp_(min=0.0)  # 95 % of a normal lie within


def _bf16(part: Tensor, generator: torch.Generator) -> None:
    _normal(part, generator)
    part.copy_(part.bfloat16())


class Distribution(NamedTuple):
    text: str
    fill: Callable[[Tensor, torch.Generator], None]
    order: int = 0  # 1 sorted ascending, -1 descending


DISTRIBUTIONS = {
    "normal": Distribution("magnitudes of a normal", _normal),
    "cauchy": Distribution("heavy tails: magnitudes of a Cauchy", _heavy),
    "lognormal": Distribution("heavy tails: log-normal, sigma 2", _lognormal),
    "levels": Distribution("quantised: 256 values, each many times", _levels),
    "equal": Distribution("all equal", _equal),
    "ascending": Distribution("magnitudes of a normal, sorted ascending", _normal, 1),
    "descending": Distribution("magnitudes of a normal, sorted descending", _normal, -1),
    "zeros": Distribution("95 % zeros", _zeros),
    "bf16": Distribution("magnitudes of a normal, rounded to bfloat16", _bf16),
}


def make_scores(distribution: str, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor `[size]` of scores that are not negative, the same at every call.

    It is filled in stretches, so that no temporary of its size is made, and in memory of torch's
    allocator, where a user's weights are.
    """
    kind = DISTRIBUTIONS[distribution]
    scores = torch.empty(size, dtype=dtype)
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(f"{distribution} {size}".encode()))
    for start in range(0, size, _CHUNK):
        kind.fill(scores[start : start + _CHUNK], generator)
    if kind.order:
        scores.numpy().sort()
    return scores if kind.order >= 0 else scores.flip(0)


def repeated_scores(size: int) -> Tensor:
    """A float16 tensor of magnitudes, one stretch again and again, for sizes beyond 2^31."""
    scores = torch.empty(size, dtype=torch.float16)
    generator = torch.Generator().manual_seed(SEED)
    stretch = torch.randn(_CHUNK // 4 + 4096, generator=generator).abs().half()
    for index, start in enumerate(range(0, size, _CHUNK // 4)):
        part = scores[start : start + _CHUNK // 4]
        part.copy_(stretch[index * 7 : index * 7 + part.numel()])
    return scores


def kept_count(size: int, keep: float) -> int:
    """How many of `size` scores a fraction keeps, at least one."""
    return max(1, round(size * keep))


def rows_of(
    cell: Mapping[str, Any], pairs: Mapping[str, tuple[tuple[float, int], tuple[float, int]]]
) -> list[Row]:
    """Rows of the results: paikern's (seconds, samples) and each contender's, in the same turn."""
    return [
        {
            **cell,
            "sparsity": 1.0 - cell["keep"],
            "reference": name,
            "seconds": ours[0],
            "reference_seconds": other[0],
            "ratio": other[0] / ours[0],
            "samples": ours[1],
            "reference_samples": other[1],
        }
        for name, (ours, other) in pairs.items()
    ]
