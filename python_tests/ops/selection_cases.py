"""Shared by the tests of selection: an oracle by `numpy.lexsort`, and lists of tensors to rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from paikern import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# -0, the smallest subnormals of every type, the neighbours of 1, the largest, infinity.
SPECIAL = (0.0, -0.0, 5e-324, 1e-45, 6e-8, 1e-40, 2e-38, 1.0, 1.0 + 2**-10, -1.0, 65504.0, 3e38)


def lexsort_masks(
    scores: Sequence[Tensor],
    k: int | Sequence[int],
    exponents: Sequence[int] | None = None,
    absolute: bool = False,
) -> list[Tensor]:
    """Bool masks by (score * 2**exponent descending, position ascending), nothing rounded."""
    if isinstance(k, int):
        exponents = exponents or [0] * len(scores)
        parts = [_levels(s, e, absolute) for s, e in zip(scores, exponents, strict=True)]
        level = np.concatenate([part[0] for part in parts])
        mantissa = np.concatenate([part[1] for part in parts])
        order = np.lexsort((np.arange(level.size), -mantissa, -level))
        kept = np.zeros(level.size, dtype=bool)
        kept[order[:k]] = True
        flat = torch.from_numpy(kept).split([s.numel() for s in scores])
        return [mask.reshape(s.shape) for mask, s in zip(flat, scores, strict=True)]
    return [lexsort_masks([s], n, None, absolute)[0] for s, n in zip(scores, k, strict=True)]


def _levels(scores: Tensor, exponent: int, absolute: bool) -> tuple[np.ndarray, np.ndarray]:
    """Signed binary order of magnitude (infinity outermost, zero in the middle), and mantissa."""
    values = scores.detach().double().reshape(-1).numpy()
    values = np.abs(values) if absolute else values
    mantissa, power = np.frexp(values)
    level = np.sign(values) * (power.astype(np.float64) + exponent + 2.0**30)
    level = np.where(np.isinf(values), np.sign(values) * 2.0**40, level)
    return level, np.where(np.isinf(values) | (values == 0), 0.0, mantissa)


def unpacked(packed: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    return [ops.unpack_mask(bits, s.shape) for bits, s in zip(packed, scores, strict=True)]


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def make_scores(
    generator: np.random.Generator, size: int, kind: str, dtype: torch.dtype, layout: str
) -> Tensor:
    """A tensor of `size` scores with the ties, extremes and strides that the name says."""
    values = generator.standard_normal(size)
    if kind == "ties":
        values = np.round(values)
    elif kind == "special":
        values = generator.choice([*SPECIAL, np.inf, -np.inf], size)
    elif kind == "constant":
        values = np.full(size, 0.25)
    elif kind == "subnormal":
        values = values * 1e-39
    elif kind == "zeros":
        values = np.where(generator.random(size) < 0.8, generator.choice([0.0, -0.0], size), values)
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(values).to(dtype)
    if layout == "strided":
        spread = torch.full((size, 3), float("nan"), dtype=dtype)
        spread[:, 1] = tensor
        return spread[:, 1]
    if layout == "transposed" and size % 2 == 0:
        return tensor.reshape(2, size // 2).T
    return tensor


KINDS = ("plain", "ties", "special", "constant", "subnormal", "zeros")
LAYOUTS = ("contiguous", "strided", "transposed")


@dataclass(frozen=True)
class Problem:
    scores: list[Tensor]
    k: int | list[int]
    exponents: list[int] | None
    absolute: bool


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Lists of small tensors; sizes beyond one byte, one word and one vector are among them."""
    lengths = st.sampled_from([0, 1, 2, 7, 8, 9, 31, 33, 64, 100])
    sizes = draw(st.lists(lengths, min_size=1, max_size=5))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scores = [
        make_scores(
            generator,
            size,
            draw(st.sampled_from(KINDS)),
            draw(st.sampled_from(DTYPES)),
            draw(st.sampled_from(LAYOUTS)),
        )
        for size in sizes
    ]
    total = sum(sizes)
    if draw(st.booleans()):
        k: int | list[int] = draw(st.one_of(st.just(0), st.just(total), st.integers(0, total)))
        shifts = st.one_of(st.integers(-30, 30), st.integers(-400_000, 400_000))
        exponents = draw(st.none() | st.lists(shifts, min_size=len(sizes), max_size=len(sizes)))
    else:
        k, exponents = [draw(st.integers(0, size)) for size in sizes], None
    return Problem(scores, k, exponents, draw(st.booleans()))
