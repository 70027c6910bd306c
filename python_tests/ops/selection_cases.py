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


def lexsort_kept(
    scores: Sequence[Tensor],
    k: int | Sequence[int],
    exponents: Sequence[int] | None = None,
    absolute: bool = False,
) -> list[np.ndarray]:
    """Flat bool masks by (score * 2**exponent descending, position ascending), nothing rounded."""
    flat = [s.detach().double().reshape(-1).numpy() for s in scores]
    if absolute:
        flat = [np.abs(values) for values in flat]
    if not isinstance(k, int):
        return [_first(np.lexsort((-values,)), n) for values, n in zip(flat, k, strict=True)]
    if not flat:
        return []
    if exponents is None or len(set(exponents)) <= 1:
        order = np.lexsort((-np.concatenate(flat),))  # stable: position ascending
    else:
        parts = [_levels(values, e) for values, e in zip(flat, exponents, strict=True)]
        level, mantissa = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.lexsort((-mantissa, -level))
    return np.split(_first(order, k), np.cumsum([values.size for values in flat])[:-1])


def lexsort_masks(
    scores: Sequence[Tensor],
    k: int | Sequence[int],
    exponents: Sequence[int] | None = None,
    absolute: bool = False,
) -> list[Tensor]:
    """`lexsort_kept` as bool tensors in the shapes of the scores."""
    kept = lexsort_kept(scores, k, exponents, absolute)
    return [torch.from_numpy(m).reshape(s.shape) for m, s in zip(kept, scores, strict=True)]


def _first(order: np.ndarray, count: int) -> np.ndarray:
    kept = np.zeros(order.size, dtype=bool)
    kept[order[:count]] = True
    return kept


def _levels(values: np.ndarray, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed binary order of magnitude (infinity outermost, zero in the middle), and mantissa."""
    mantissa, power = np.frexp(values)
    level = np.sign(values) * (power.astype(np.float64) + exponent + 2.0**30)
    level = np.where(np.isinf(values), np.sign(values) * 2.0**40, level)
    return level, np.where(np.isinf(values) | (values == 0), 0.0, mantissa)


def packed_bytes(kept: np.ndarray) -> bytes:
    """The packed mask by its definition: little-endian bits, spare bits zero."""
    return np.packbits(kept, bitorder="little").tobytes()


def unpacked(packed: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    return [ops.unpack_mask(bits, s.shape) for bits, s in zip(packed, scores, strict=True)]


def equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def make_values(generator: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """`size` doubles with the ties and extremes that the name says."""
    if kind == "special":
        return generator.choice([*SPECIAL, np.inf, -np.inf], size)
    if kind == "constant":
        return np.full(size, 0.25)
    if kind == "levels":  # quantised: 256 values
        return generator.integers(0, 256, size) / 256
    if kind == "wide":  # magnitudes from below float32's subnormals to its largest
        return 10.0 ** generator.uniform(-46, 38, size)
    values = generator.standard_normal(size)
    if kind == "ties":
        return np.round(values)
    if kind == "subnormal":
        return values * 1e-39
    if kind == "zeros":
        return np.where(generator.random(size) < 0.8, generator.choice([0.0, -0.0], size), values)
    if kind == "ascending":
        return np.sort(values)
    if kind == "descending":
        return -np.sort(values)
    return values


def make_scores(
    generator: np.random.Generator, size: int, kind: str, dtype: torch.dtype, layout: str
) -> Tensor:
    """A tensor of `size` scores with the ties, extremes and strides that the names say.

    What lies between and around its elements in memory is NaN, so that a stray read is refused.
    """
    if layout == "expanded" and size % 2 == 0 and size > 0:
        half = make_scores(generator, size // 2, kind, dtype, "contiguous")
        if generator.random() < 0.5:
            return half[:, None].expand(size // 2, 2)
        return half[None].expand(2, size // 2)
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(make_values(generator, size, kind)).to(dtype)
    if layout == "strided":
        spread = torch.full((size, 3), float("nan"), dtype=dtype)
        spread[:, 1] = tensor
        return spread[:, 1]
    if layout == "transposed" and size % 2 == 0:
        return tensor.reshape(2, size // 2).T
    if layout == "offset":  # off the alignment of its type's vectors
        before, after = generator.integers(0, 19, 2)
        guarded = torch.full((size + before + after,), float("nan"), dtype=dtype)
        guarded[before : before + size] = tensor
        return guarded[before : before + size]
    if layout == "columns" and size % 3 == 0:  # every third column left out
        spread = torch.full((size // 3, 5), float("nan"), dtype=dtype)
        spread[:, ::2] = tensor.reshape(size // 3, 3)
        return spread[:, ::2]
    if layout == "channels_last" and size % 12 == 0:
        shaped = tensor.reshape(-1, 3, 2, 2)
        return shaped.contiguous(memory_format=torch.channels_last)
    if layout == "permuted" and size % 8 == 0:
        return tensor.reshape(2, size // 8, 4).permute(2, 0, 1)
    return tensor


KINDS = ("plain", "ties", "special", "constant", "subnormal", "zeros")
LAYOUTS = ("contiguous", "strided", "transposed")
ALL_KINDS = (*KINDS, "levels", "wide", "ascending", "descending")
ALL_LAYOUTS = (*LAYOUTS, "offset", "columns", "channels_last", "permuted", "expanded")


@dataclass(frozen=True)
class Problem:
    scores: list[Tensor]
    k: int | list[int]
    exponents: list[int] | None
    absolute: bool

    def packed(self) -> list[Tensor]:
        return ops.topk_mask(self.scores, self.k, exponents=self.exponents, absolute=self.absolute)

    def expected(self) -> list[bytes]:
        kept = lexsort_kept(self.scores, self.k, self.exponents, self.absolute)
        return [packed_bytes(part) for part in kept]


#: name -> (tensors at least, at most, sizes). Sizes lie around a byte, a vector, and the powers of
#: two at which a kernel may change its way.
GROUPS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "small": (1, 5, (0, 1, 2, 7, 8, 9, 12, 15, 16, 17, 31, 33, 48, 63, 64, 65, 96, 100, 128, 333)),
    "crowd": (0, 200, (0, 1, 5, 8, 12, 24, 31, 64)),
    "border": (1, 3, (255, 256, 257, 511, 512, 513, 1008, 1023, 1024, 1025, 2047, 2048, 2049, 2400,
                      4095, 4096, 4097, 8191, 8192, 8193)),
    "large": (1, 3, (1000, 16_383, 16_385, 32_768, 65_535, 65_536, 65_537, 98_304, 131_071, 131_073,
                     262_143, 262_145, 300_000)),
    "million": (1, 2, (0, 513, 65_537, 524_287, 524_289, 999_999, 1_000_000)),
}  # fmt: skip


def random_problem(generator: np.random.Generator, group: str) -> Problem:
    """A problem of a group; cheap to make, as all of it comes from the one generator."""
    least, most, lengths = GROUPS[group]
    count = int(generator.integers(least, most + 1))
    sizes = generator.choice(lengths, count).tolist()
    if group == "million" and max(sizes) < 500_000:
        sizes[0] = 1_000_000
    dtypes = generator.integers(0, len(DTYPES), count if generator.random() < 0.3 else 1)
    scores = [
        make_scores(
            generator,
            size,
            ALL_KINDS[generator.integers(len(ALL_KINDS))],
            DTYPES[dtypes[i % dtypes.size]],
            ALL_LAYOUTS[generator.integers(len(ALL_LAYOUTS))],
        )
        for i, size in enumerate(sizes)
    ]
    exponents = None
    if generator.random() < 0.4:
        reach = int(generator.choice([3, 30, 300, 400_000]))
        exponents = generator.integers(-reach, reach + 1, count).tolist()
    k: int | list[int]
    if generator.random() < 0.6:
        k = random_count(generator, sum(sizes))
    else:
        k = [random_count(generator, size) for size in sizes]
    return Problem(scores, k, exponents, bool(generator.random() < 0.5))


def random_count(generator: np.random.Generator, total: int) -> int:
    """A k in [0, total]: the ends, their neighbours, or anything between."""
    if generator.random() < 0.3:
        return int(generator.choice([0, min(1, total), max(total - 1, 0), total]))
    return int(total * generator.random() ** 2)


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
